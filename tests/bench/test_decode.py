"""`bitdistill bench decode`: tokens per second of any model, limited by the bytes that a step reads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import bitdistill_kernels
from bitdistill_ray.bench import limits, main
from bitdistill_ray.bench.decode import measure_random, measure_shape
from bitdistill_ray.bench.kernels import parse_format
from bitdistill_ray.bench.limits import Place
from bitdistill_ray.bench.models import Size, byte_tokenizer, save_random_packed
from bitdistill_ray.bench.shapes import SHAPES
from bitdistill_ray.bench.subject import Load, Subject
from tests.bench.test_report import KEYS
from tests.tiny_models import save_tiny, tiny_model

SIZE = Size(hidden=128, layers=1, vocabulary=320)
LOAD = Load(batch=2, prompt_tokens=6, new_tokens=3)


@pytest.fixture(autouse=True)
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    monkeypatch.setattr(limits, "POOL_BYTES", 1 << 20)
    before = torch.get_num_threads(), bitdistill_kernels.threads()
    yield Place.of(torch.device("cpu"), 1)
    torch.set_num_threads(before[0])
    bitdistill_kernels.set_threads(before[1])


def test_a_random_student_beside_its_model(place: Place) -> None:
    rows = measure_random([parse_format("nf3"), parse_format("ternary")], SIZE, LOAD, place)
    memory, speed = ["weights", "cache", "resident"], ["decode", "prefill"] * 2
    assert [(r.format, r.metric) for r in rows] == [(f, m) for f in ("nf3", "ternary") for m in (*memory, *speed)]
    for row in rows:
        assert row.baseline is not None
        assert min(row.value, row.baseline) > 0
        assert (row.limit is not None) is (row.metric == "decode")


def test_models_by_name(tmp_path: Path) -> None:
    packed = save_random_packed(tmp_path / "packed", SIZE, parse_format("int2"))
    plain, file = save_tiny(tmp_path / "plain"), tmp_path / "decode.json"
    arguments = ["--threads", "1", "--batch", "2", "--prompt-tokens", "5", "--new-tokens", "2", "--json", str(file)]
    assert main(["decode", packed, "--baseline", str(plain), *arguments]) == 0
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    speeds = ["decode, batch 1", "prefill, batch 1 x 5", "decode, batch 2", "prefill, batch 2 x 5"]
    memory = ["bytes per token", "keys and values", "resident memory"]
    assert [row["case"] for row in rows] == memory + speeds
    for row in rows:
        assert set(row) == KEYS
        assert row["format"] == "int2"
        lower = row["unit"] == "MiB"
        assert row["ratio"] == pytest.approx((row["value"] / row["baseline"]) ** (-1 if lower else 1))
        assert row["baseline_is"] == "plain (not packed) in float16, native"
        if row["metric"] == "decode":
            assert row["share"] == pytest.approx(row["value"] / row["limit"])


def test_a_step_reads_what_is_stored_and_of_an_untied_embedding_only_rows(place: Place, tmp_path: Path) -> None:
    packed = save_random_packed(tmp_path / "packed", SIZE, parse_format("nf3"))
    with safe_open(Path(packed) / "model.safetensors", framework="pt") as file:
        stored = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118  (no mapping)
    assert Subject.open(packed, place, LOAD).nbytes == stored
    for case in ("llama", "llama-untied"):
        model = tiny_model(case)
        parameters = sum(p.numel() for p in model.parameters())
        table = model.get_input_embeddings().weight.numel() if case == "llama-untied" else 0
        assert Subject.open(str(save_tiny(tmp_path / case, case)), place, LOAD).nbytes == 2 * (parameters - table)


def test_a_known_shape_in_each_format(monkeypatch: pytest.MonkeyPatch, place: Place) -> None:
    monkeypatch.setitem(SHAPES, "tiny", tiny_model("qwen3").config)
    rows = measure_shape("tiny", [None, parse_format("int3:a8")], LOAD, place)
    weights = {row.format: row.value * 2**20 for row in rows if row.metric == "weights"}
    parameters, linears = (
        sum(p.numel() for p in tiny_model("qwen3").parameters()),
        2 * 32 * (64 + 32 + 32 + 64 + 3 * 48),
    )
    assert weights[None] == 2 * parameters
    packed = parse_format("int3").bits_per_weight(48, 32)  # one group a row, whatever its length
    assert weights["int3"] < 2 * (parameters - linears) + (packed + 1) * linears / 8
    assert [row.baseline is None for row in rows] == [True] * 7 + [False] * 7


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("model", "--formats", "nf3"), "--formats: given with MODEL"),
        (("--baseline", "model"), "--baseline: given"),
        (("model", "--shape", "1.1b-llama"), "--shape: given with MODEL"),
        (("--shape", "7b"), "--shape: '7b' is not known"),
    ],
)
def test_mistakes_are_named(arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["decode", *arguments]) == 2
    assert capsys.readouterr().err.startswith(said)


def test_bytes_are_tokens() -> None:
    text = "Ein Fuß, 雨!\n"
    tokenizer = byte_tokenizer()
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
