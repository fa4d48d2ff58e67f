"""Tasks that fail, on a Ray of their own: what goes wrong here takes the whole process down."""

from __future__ import annotations

import subprocess
import sys

import pytest

DRIVER = """
import ray
from bitdistill_ray.stages.cluster import cancel_unfinished

@ray.remote
def fails():
    raise ValueError

@ray.remote
def runs():
    import time
    time.sleep(600)

ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
for _ in range(300):
    task = fails.remote()
    try:
        ray.get(task)
    except ValueError:
        cancel_unfinished([task])
sleeper = runs.remote()
cancel_unfinished([sleeper])
try:
    ray.get(sleeper, timeout=60)
except ray.exceptions.TaskCancelledError:
    print("cancelled")
"""


@pytest.mark.slow
def test_a_failed_task_is_not_cancelled_and_a_running_one_is() -> None:
    """Ray's core died within the first hundred of the failed ones when they were cancelled too."""
    run = subprocess.run([sys.executable, "-c", DRIVER], capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.splitlines()[-1] == "cancelled"
