"""`bitdistill bench kernels`: figures that agree with each other, for every format, on matrices of any shape."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import bitdistill_kernels
from bitdistill_ray.bench import limits, main, timing
from bitdistill_ray.bench.kernels import parse_format, parse_shape
from bitdistill_ray.core import Format, Granularity, QuantSpec
from bitdistill_ray.errors import ConfigError
from tests.bench.test_report import KEYS


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small pools and short windows; and the threads of this process as they were."""
    monkeypatch.setattr(limits, "POOL_BYTES", 1 << 20)
    monkeypatch.setattr(timing, "WINDOW_S", 1e-4)
    before = torch.get_num_threads(), bitdistill_kernels.threads()
    yield
    torch.set_num_threads(before[0])
    bitdistill_kernels.set_threads(before[1])


def rows(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    file = folder / "kernels.json"
    assert main(["kernels", "--threads", "1", "--json", str(file), *arguments]) == 0
    found: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["rows"]
    return found


def test_every_format_and_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = rows(tmp_path, "--formats", ",".join(Format), "--shapes", "48x200,64x64")
    printed = capsys.readouterr().out
    assert len(found) == len(Format) * 2 * 6
    for row in found:
        assert set(row) == KEYS
        assert row["threads"] == 1
        assert min(row["value"], row["limit"], row["share"]) > 0
        higher = row["metric"] != "time"
        assert row["share"] == pytest.approx((row["value"] / row["limit"]) ** (1 if higher else -1))
        if row["metric"] == "time":
            assert row["ratio"] == pytest.approx(row["baseline"] / row["value"])
        assert f"{row['case']}  " in printed


def test_rates_are_work_over_time(tmp_path: Path) -> None:
    """GB/s times seconds are the bytes of docs/FORMAT.md, GOPS times seconds are 2 M N K; both shares say the same."""
    N, K = 96, 256
    found = {(r["shape"][0], r["metric"]): r for r in rows(tmp_path, "--formats", "nf3", "--shapes", f"{N}x{K}")}
    spec = QuantSpec(format=Format.NF3, group_size=128)
    stored = spec.bits_per_weight(N, K) * N * K / 8
    assert found[1, "bandwidth"]["value"] * found[1, "time"]["value"] * 1e3 == pytest.approx(stored)
    assert found[128, "throughput"]["value"] * found[128, "time"]["value"] * 1e3 == pytest.approx(2 * 128 * N * K)
    assert found[1, "bandwidth"]["share"] == pytest.approx(found[1, "time"]["share"])
    assert found[128, "throughput"]["share"] == pytest.approx(found[128, "time"]["share"])


def test_formats_by_name() -> None:
    per_tensor = {"granularity": Granularity.TENSOR, "group_size": None}
    assert parse_format("ternary") == QuantSpec(format=Format.TERNARY, activation_bits=8, **per_tensor)  # type: ignore[arg-type]
    assert parse_format("ternary:a16").activation_bits is None
    assert parse_format("nf3") == QuantSpec(format=Format.NF3, group_size=128)
    assert parse_format("int2:a8").activation_bits == 8
    assert parse_format("seq2").granularity is Granularity.ROW
    assert parse_shape("4096X14336") == (4096, 14336)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--formats", "int5"), "--formats: 'int5'"),
        (("--formats", "int2:a4"), "--formats: 'int2:a4'"),
        (("--shapes", "4096"), "--shapes: '4096'"),
        (("--shapes", "0x8"), "--shapes: '0x8'"),
        (("--threads", "0"), "--threads: 0"),
        (("--tokens", "1,-1"), "--tokens: 1,-1"),
    ],
)
def test_mistakes_are_named(arguments: tuple[str, str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", *arguments]) == 2
    assert capsys.readouterr().err.startswith(said)


def test_a_missing_gpu_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert main(["kernels", "--device", "cuda"]) == 2
    assert "torch sees no GPU here" in capsys.readouterr().err


def test_an_unknown_format_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="ternary, int2"):
        parse_format("")
