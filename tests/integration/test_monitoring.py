"""What people see of a real run: every figure in its row, and measuring changes no loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bitdistill_ray.report.axis import figure
from bitdistill_ray.train import run
from tests.integration.curves import overrides_of, rows_of, same_rows
from tests.road import tiny_config

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(600)]

TRAIN_ONLY = ("stages.write=false", "stages.clip=false", "stages.export=false", "stages.evaluate=false")
LOSS = "{ce: 0.5, cakld: 1, gamma: 0.3}"


def trained(root: Path, name: str, *overrides: str) -> list[dict[str, Any]]:
    """The rows of six steps of two workers."""
    (root / "corpus.jsonl").write_text("\n".join(f'{{"text": "the cat number {i} sat on the mat"}}' for i in range(99)))
    run(tiny_config(root, *TRAIN_ONLY, f"data={root}/corpus.jsonl", "student.workers=2", "quant.format=int2",
                    f"stages.distill.loss={LOSS}", *overrides, run=str(root / name)))  # fmt: skip
    return [json.loads(line) for line in (root / name / "metrics.jsonl").read_text().splitlines()]


def test_a_measured_run_has_the_rows_of_one_that_is_not(alone: Path, victim: Path) -> None:
    run(tiny_config(alone.parent, *overrides_of(alone.parent), "monitor.codes_every=2", "monitor.gradients_every=3",
                    "monitor.tensorboard=true", "monitor.quality_every=3", run=str(victim)))  # fmt: skip
    same_rows(victim, alone)
    measured = rows_of(victim)
    assert [row["step"] for row in measured if "flip_rate" in row] == [1, 3, 5, 7]
    assert [row["step"] for row in measured if row.get("grad_norm_cakld", 0) > 0] == [2, 5]
    looked = [row for row in measured if "ppl:excerpt" in row]
    assert [row["step"] for row in looked] == [2, 5, 7]
    assert all(row["kl:excerpt"] > 0 and 0 <= row["agreement:excerpt"] <= 1 for row in looked)
    report = (victim / "report.html").read_text(encoding="utf-8")
    for shown in ("Codes that change", "KL to the teacher", "down_proj", figure(measured[-1]["loss"])):
        assert shown in report
    assert list((victim / "tensorboard/distill").glob("events.out.tfevents.*"))


@pytest.mark.soak
@pytest.mark.parametrize("zero", [2, 3])
def test_a_measured_run_of_two_workers_has_the_losses_of_one_that_is_not(tmp_path: Path, zero: int) -> None:
    measured = trained(tmp_path, "measured", f"student.zero={zero}", "monitor.codes_every=2",
                       "monitor.gradients_every=3", "monitor.tensorboard=true")  # fmt: skip
    plain = trained(tmp_path, "plain", f"student.zero={zero}", "monitor.codes_every=0")
    same = ("step", "loss", "ce", "cakld", "grad_norm", "learning_rate", "tokens")
    assert [[row[key] for key in same] for row in measured] == [[row[key] for key in same] for row in plain]
    assert [row["step"] for row in measured if "flip_rate" in row] == [1, 3, 5]
    assert all(0 < row["flip_rate"] < 1 and 0 < row["zeros"] < 1 for row in measured if "flip_rate" in row)
    with_gradients = [row["step"] for row in measured if row.get("grad_norm_ratio", 0) > 0]
    assert with_gradients == ([2, 5] if zero < 3 else [])
    assert not any("flip_rate" in row or "grad_norm_ratio" in row for row in plain)
    report = (tmp_path / "measured/report.html").read_text(encoding="utf-8")
    for shown in ("Codes that change", "Loss: cakld", "down_proj", figure(measured[-1]["loss"])):
        assert shown in report
    assert list((tmp_path / "measured/tensorboard/distill").glob("events.out.tfevents.*"))
