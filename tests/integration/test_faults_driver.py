"""The command itself is interrupted, told to go and killed; given again, it goes on with the same rows, bit for bit."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from bitdistill_ray.train import run
from tests.integration.curves import STEPS, overrides_of, same_rows
from tests.road import tiny_config, tiny_overrides

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(600)]

WAIT_S = 240.0


SIGNALLED = """
import os, pathlib, sys
from bitdistill_ray.stages import training
from bitdistill_ray.train import main
from tests.integration.disturbed import signals_the_driver
pathlib.Path(sys.argv[1], "driver").write_text(f"{os.getpid()} {sys.argv[2]}")
training.train_worker = signals_the_driver
sys.exit(main(["demo", *sys.argv[3:]]))
"""


def test_an_interrupted_a_terminated_and_a_killed_driver_have_the_same_rows(
    alone: Path, victim: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C with a Ray of its own; SIGTERM, then SIGKILL to a job on this cluster; the fourth one finishes.

    Checkpoints are far apart, so the one that the last two start from is SIGTERM's.
    """
    overrides = (*overrides_of(alone.parent), "stages.distill.checkpoint_every=100")
    arguments = tiny_overrides(alone.parent, *overrides, run=str(victim))
    on_its_own = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    here = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}

    def signalled(number: int, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", SIGNALLED, str(victim), str(int(number)), *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=WAIT_S)

    interrupted = signalled(signal.SIGINT, on_its_own)
    assert interrupted.returncode == 130, interrupted
    assert interrupted.stderr.splitlines()[-1] == "interrupted; the same command continues the run"
    assert "Traceback" not in interrupted.stdout + interrupted.stderr

    told = signalled(signal.SIGTERM, here)
    assert told.returncode == 143, told
    assert "[refine] finished before, skipped" in told.stdout
    saved = re.search(r"told to stop \(SIGTERM\): saved step ([345])\n", told.stdout)
    assert saved, told.stdout
    assert "resumes" not in told.stdout
    assert told.stderr.splitlines()[-1] == "told to stop (SIGTERM); the same command continues the run"
    assert "Traceback" not in told.stdout + told.stderr

    assert signalled(signal.SIGKILL, here).returncode == -signal.SIGKILL
    run(tiny_config(alone.parent, *overrides, run=str(victim)))
    assert f"resumes at step {saved[1]} of {STEPS}" in capsys.readouterr().out, told.stdout
    same_rows(victim, alone)
