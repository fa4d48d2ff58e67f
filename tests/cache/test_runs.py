"""Whole runs with a cache: equal to the live run, silent towards the teacher, and mended where a block is damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from bitdistill_ray.cache.block import BLOCK
from bitdistill_ray.train import run
from tests.road import tiny_config

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(900)]

OVERRIDES = (
    "stages.write=false",
    "stages.clip=false",
    "stages.export=false",
    "stages.evaluate=false",
    "stages.distill.loss={forward_kl: 1.0, cakld: 0.0, gamma: label}",
    "student.dtype=fp32",
    "teacher.dtype=fp32",
    "teacher.payload=topk",
    "teacher.topk=50",
)
EXACT = ("step", "loss", "forward_kl", "learning_rate", "grad_norm", "tokens")
STEPS, SEQUENCES = 6, 24

Row = dict[str, float]
Train = Callable[..., list[Row]]


@pytest.fixture
def train(tmp_path: Path) -> Train:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("\n".join(f'{{"text": "the cat number {i} sat on the mat"}}' for i in range(100)))

    def run_named(name: str, *overrides: str) -> list[Row]:
        folder = tmp_path / name
        run(tiny_config(tmp_path, f"data={corpus}", *OVERRIDES, *overrides, run=str(folder)))
        return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    return run_named


def facts(rows: list[Row]) -> list[Row]:
    assert len(rows) == STEPS
    return [{name: row[name] for name in EXACT} for row in rows]


def total(rows: list[Row], name: str) -> float:
    return sum(row[name] for row in rows)


def test_a_second_run_asks_no_teacher_and_a_damaged_block_is_made_again(
    tmp_path: Path, train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lossless: without a cache, filling one, reading it, and reading it with a bit flipped give the same bits."""
    cache = tmp_path / "cache"
    cached = (f"teacher.cache.folder={cache}", "teacher.cache.block_sequences=8")
    live, first, second = train("live"), train("first", *cached), train("second", *cached)
    assert facts(live) == facts(first) == facts(second)
    assert total(first, "teacher_bytes") == total(live, "teacher_bytes") > 0
    assert total(first, "cache_misses") == SEQUENCES
    assert total(second, "cache_hits") == SEQUENCES
    assert total(second, "teacher_bytes") == total(second, "cache_misses") == total(second, "retries") == 0

    blocks = sorted(cache.rglob(f"*{BLOCK}"))
    assert len(blocks) == SEQUENCES // 8
    raw = bytearray(blocks[0].read_bytes())
    raw[len(raw) // 2] ^= 1
    blocks[0].write_bytes(raw)
    blocks[1].write_bytes(blocks[1].read_bytes()[:-100])
    capsys.readouterr()
    third = train("third", *cached)
    said = capsys.readouterr().out
    assert f"{blocks[0]} fails its checksum; removed, the teacher is asked again about its 8 sequences" in said
    assert f"{blocks[1]} has " in said
    assert facts(third) == facts(live)
    assert total(third, "cache_misses") == 16
    fourth = train("fourth", *cached)
    assert facts(fourth) == facts(live)
    assert total(fourth, "cache_misses") == total(fourth, "teacher_bytes") == 0


def test_a_compact_cache_in_object_storage_serves_a_run_with_nearly_the_live_losses(
    train: Train, s3_bucket: str, s3_endpoint: str
) -> None:
    cached = (f"teacher.cache={{folder: {s3_bucket}/cache, coding: compact}}", f"storage.endpoint_url={s3_endpoint}")
    live, first, second = train("live"), train("first", *cached), train("second", *cached)
    assert facts(first) == facts(second)
    assert total(second, "teacher_bytes") == total(second, "cache_misses") == 0
    assert total(second, "cache_hits") == SEQUENCES
    assert [row["loss"] for row in second] == pytest.approx([row["loss"] for row in live], rel=0.005)
