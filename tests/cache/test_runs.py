"""Whole runs with a cache: equal to the one that filled it, silent towards the teacher, mended where it is damaged.

That the answers kept are the live ones, bit for bit, is `test_client.py`'s to show.
"""

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


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Train:
    root = tmp_path_factory.mktemp("runs")
    corpus = root / "corpus.jsonl"
    corpus.write_text("\n".join(f'{{"text": "the cat number {i} sat on the mat"}}' for i in range(100)))

    def run_named(name: str, *overrides: str) -> list[Row]:
        folder = root / name
        run(tiny_config(root, f"data={corpus}", *OVERRIDES, *overrides, run=str(folder)))
        return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    return run_named


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Overrides that name a cache."""
    return (f"teacher.cache.folder={tmp_path_factory.mktemp('cache')}", "teacher.cache.block_sequences=8")


@pytest.fixture(scope="module")
def live(train: Train, cache: tuple[str, ...]) -> list[Row]:
    """The rows of the run that asks the teacher, and fills the cache."""
    return train("live", *cache)


def facts(rows: list[Row]) -> list[Row]:
    assert len(rows) == STEPS
    return [{name: row[name] for name in EXACT} for row in rows]


def total(rows: list[Row], name: str) -> float:
    return sum(row[name] for row in rows)


def test_damaged_blocks_are_made_again_and_the_whole_one_is_read(
    train: Train, cache: tuple[str, ...], live: list[Row], capsys: pytest.CaptureFixture[str]
) -> None:
    """Lossless: filling a cache, and reading it where it is not damaged, give the same bits."""
    assert total(live, "cache_misses") == SEQUENCES
    assert total(live, "teacher_bytes") > 0

    blocks = sorted(Path(cache[0].split("=")[1]).rglob(f"*{BLOCK}"))
    assert len(blocks) == SEQUENCES // 8
    written = [block.read_bytes() for block in blocks]
    flipped = bytearray(written[0])
    flipped[len(flipped) // 2] ^= 1
    blocks[0].write_bytes(flipped)
    blocks[1].write_bytes(written[1][:-100])
    capsys.readouterr()
    second = train("second", *cache)
    said = capsys.readouterr().out
    assert f"{blocks[0]} fails its checksum; removed, the teacher is asked again about its 8 sequences" in said
    assert f"{blocks[1]} has " in said
    assert facts(second) == facts(live)
    assert (total(second, "cache_misses"), total(second, "cache_hits")) == (16, 8)
    assert [block.read_bytes() for block in blocks] == written


def test_a_second_run_asks_no_teacher_and_a_compact_cache_in_object_storage_has_nearly_the_live_losses(
    train: Train, live: list[Row], s3_bucket: str, s3_endpoint: str
) -> None:
    cached = (f"teacher.cache={{folder: {s3_bucket}/cache, coding: compact}}", f"storage.endpoint_url={s3_endpoint}")
    first, second = train("compact-first", *cached), train("compact-second", *cached)
    assert facts(first) == facts(second)
    assert total(second, "teacher_bytes") == total(second, "cache_misses") == total(second, "retries") == 0
    assert total(second, "cache_hits") == SEQUENCES
    assert [row["loss"] for row in second] == pytest.approx(
        [row["loss"] for row in live],
        rel=0.005,
        abs=5e-4,  # nats: what the coder's noise leaves where the student is within 0.02 nats of its teacher
    )
