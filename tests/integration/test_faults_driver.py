"""The command itself is interrupted, told to go and killed; given again, it goes on with the same rows, bit for bit."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import ray

from bitdistill_ray.student.job import TrainJob
from bitdistill_ray.student.worker import Worker
from bitdistill_ray.train import run
from tests.integration.curves import STEPS, overrides_of, same_rows
from tests.integration.test_faults_around import MICROS, disturbed
from tests.road import tiny_config, tiny_overrides

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(600)]

WAIT_S = 240.0


def tells_the_driver(settings: dict[str, TrainJob]) -> None:
    """In its third step the driver gets SIGTERM."""
    worker = Worker(settings["job"])

    def tell() -> None:
        os.kill(int((Path(worker.job.run.storage.url) / "driver").read_text()), signal.SIGTERM)
        while not ray.get(worker.job.monitor.is_stopping.remote()):
            time.sleep(0.05)

    disturbed(worker, {2 * MICROS: tell})


TOLD_BY_ITS_WORKER = """
import os, pathlib, sys
from bitdistill_ray.stages import training
from bitdistill_ray.train import main
from tests.integration.test_faults_driver import tells_the_driver
pathlib.Path(sys.argv[1], "driver").write_text(str(os.getpid()))
training.train_worker = tells_the_driver
sys.exit(main(["demo", *sys.argv[2:]]))
"""


def signalled(
    command: list[str], environment: dict[str, str], number: int, log: Path, when: Callable[[str], bool]
) -> int:
    """Run `command` until `when(what it printed)`, send it the signal; its status."""
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment,
                                   start_new_session=True)  # fmt: skip
    deadline = time.monotonic() + WAIT_S
    while not when(log.read_text()) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.poll() is None, log.read_text()
    process.send_signal(number)
    return process.wait(WAIT_S)


def test_an_interrupted_a_terminated_and_a_killed_driver_have_the_same_rows(
    alone: Path, victim: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C with a Ray of its own; SIGTERM, then SIGKILL to a job on this cluster; the fourth one finishes.

    Checkpoints are far apart, so the one that the last two start from is SIGTERM's.
    """
    overrides = (*overrides_of(alone.parent), "stages.distill.checkpoint_every=100")
    arguments = tiny_overrides(alone.parent, *overrides, run=str(victim))
    command = [sys.executable, "-m", "bitdistill_ray.train", "demo", *arguments]
    log, on_its_own = tmp_path / "log", {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    here = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}

    assert signalled(command, on_its_own, signal.SIGINT, log, lambda said: "[distill] student:" in said) == 130
    assert log.read_text().splitlines()[-1] == "interrupted; the same command continues the run"
    assert "Traceback" not in log.read_text()

    told = subprocess.run([sys.executable, "-c", TOLD_BY_ITS_WORKER, str(victim), *arguments], capture_output=True,
                          text=True, env=here, timeout=WAIT_S)  # fmt: skip
    assert told.returncode == 143, told.stdout + told.stderr
    assert "[refine] finished before, skipped" in told.stdout
    saved = re.search(r"told to stop \(SIGTERM\): saved step ([345])\n", told.stdout)
    assert saved, told.stdout
    assert told.stderr.splitlines()[-1] == "told to stop (SIGTERM); the same command continues the run"
    assert "Traceback" not in told.stdout + told.stderr

    resumed = f"resumes at step {saved[1]} of {STEPS}"
    assert signalled(command, here, signal.SIGKILL, log, lambda said: resumed in said) == -signal.SIGKILL
    run(tiny_config(alone.parent, *overrides, run=str(victim)))
    assert resumed in capsys.readouterr().out
    same_rows(victim, alone)
