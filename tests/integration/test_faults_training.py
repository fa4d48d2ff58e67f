"""Training goes on after what kills a part of it, and its rows are those of a run that was left alone, bit for bit.

Each fault is the real one: SIGKILL and SIGTERM to a worker.  All runs share one refined
student and are compared with one uninterrupted run.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from bitdistill_ray.errors import BitdistillError
from bitdistill_ray.stages import training
from bitdistill_ray.train import run
from tests.integration.curves import SEQUENCES, STEPS, overrides_of, rows_of, same_rows, student_of
from tests.integration.disturbed import told_to_stop_and_killed, told_to_stop_once
from tests.road import tiny_config

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(600)]

RESUMED = rf"resumes at step [34] of {STEPS}"  # all ranks save after the step in which they hear of it


def finish(folder: Path, *more: str) -> None:
    run(tiny_config(folder.parent, *overrides_of(folder.parent), *more, run=str(folder)))


def test_a_student_worker_that_is_told_to_stop_and_one_that_is_killed_resume_with_the_same_rows(
    alone: Path, victim: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Checkpoints are far apart, so that the one that both resume from is the one that SIGTERM made."""
    monkeypatch.setattr(training, "train_worker", told_to_stop_and_killed)
    finish(victim, "stages.distill.checkpoint_every=100")
    said = capsys.readouterr().out
    assert (victim / "signals").read_text().split() == ["15", "9"]
    assert "told to stop (SIGTERM): saved step" in said
    assert len(set(re.findall(RESUMED, said))) == 1
    assert len(re.findall(RESUMED, said)) == 2
    same_rows(victim, alone)
    student, wanted = student_of(victim), student_of(alone)  # the mean over steps before and after the kills
    assert all(torch.equal(student[name], tensor) for name, tensor in wanted.items())
    assert not (victim / "checkpoints/distill").exists()


def test_another_number_of_workers_goes_on_with_the_same_sequences(
    alone: Path, victim: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One worker is told to stop and no restart is left; two workers go on from its checkpoint."""
    with monkeypatch.context() as patch:
        patch.setattr(training, "train_worker", told_to_stop_once)
        with pytest.raises(BitdistillError, match=r"stages\.distill: a worker was told to stop .* no restart is left"):
            finish(victim, "student.zero=2", "student.max_failures=0")
    assert [row["step"] for row in rows_of(victim)] in ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5])
    finish(victim, "student.zero=2", "student.workers=2")
    for found, wanted in zip(rows_of(victim), rows_of(alone), strict=True):
        assert {k: found[k] for k in SEQUENCES} == {k: wanted[k] for k in SEQUENCES}
        assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-4)
        assert found["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-3)
    student = student_of(victim)
    for name, tensor in student_of(alone).items():
        torch.testing.assert_close(student[name], tensor, rtol=1e-3, atol=1e-5)
