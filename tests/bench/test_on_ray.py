"""`bitdistill bench teacher|train` on a real Ray: figures that are positive and agree with each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bitdistill_ray.bench import main
from tests.bench.test_report import KEYS
from tests.tiny_models import VOCAB_SIZE, save_tiny

HIDDEN = 32
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session")]


def measured(kind: str, folder: Path, *arguments: str) -> list[dict[str, Any]]:
    teacher, file = save_tiny(folder / "teacher"), folder / f"{kind}.json"
    assert main([kind, "--model", str(teacher), "--threads", "1", "--json", str(file), *arguments]) == 0
    rows: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["rows"]
    for row in rows:
        assert set(row) == KEYS
        assert row["value"] > 0
        lower = row["unit"] in ("us", "ms", "B", "MiB", "%")
        for against, other in (("share", "limit"), ("ratio", "baseline")):
            expected = row[other] and (row["value"] / row[other]) ** (-1 if lower else 1)
            assert row[against] == (expected and pytest.approx(expected))
    return rows


def test_teacher(tmp_path: Path) -> None:
    rows = {(row["case"], row["metric"]): row for row in measured("teacher", tmp_path)}
    payloads = ("logits", "hidden", "topk")
    metrics = ("answers", "wire", "payload per token")
    codings = [f"cache, topk {entries} {coding}" for entries in (50, 128) for coding in ("lossless", "compact")]
    costs = ("bytes per token", "error of the forward KL", "encode", "decode")
    assert list(rows) == [
        *((f"teacher, {payload}", metric) for payload in payloads for metric in metrics),
        ("teacher, hidden + Q, K, V of 2 x 2048 tokens, replayed", "wire"),
        *((case, metric) for case in codings for metric in costs),
    ]
    assert rows["cache, topk 128 compact", "bytes per token"]["value"] <= 300
    assert rows["cache, topk 128 compact", "error of the forward KL"]["value"] <= 0.5
    assert rows["teacher, hidden", "payload per token"]["ratio"] == VOCAB_SIZE / HIDDEN
    assert rows["teacher, topk", "payload per token"]["value"] == 64 * (4 + 2)


def test_train(tmp_path: Path) -> None:
    rows = measured("train", tmp_path, "--formats", "ternary", "--only", "steps,loss")
    relation, live, memory, arithmetic, peak, _ = rows
    assert relation["case"] == "training step, live teacher, hidden + Q, K, V"
    assert live["format"] == memory["format"] == "ternary"
    assert arithmetic["unit"] == "TFLOP/s"
    assert arithmetic["limit"] is None  # a CPU's peak is not guessed
    assert live["limit"] == memory["value"]
    assert memory["baseline"] > 0
    assert peak["metric"] == "peak memory"
    assert peak["ratio"] > 2  # an eighth of the tokens at a time: exact figures, not times


@pytest.mark.soak
def test_train_over_workers(tmp_path: Path) -> None:
    (scale,) = measured("train", tmp_path, "--formats", "ternary", "--only", "scale")
    assert scale["case"] == "training step of 2 workers, answers in memory"
    assert scale["limit"] > 0
