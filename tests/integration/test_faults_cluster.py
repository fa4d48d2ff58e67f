"""Training goes on when a node of the cluster is taken away, and when Ray's object store is full.

Each test has a Ray of its own, in a process of its own, whose object stores are too small for the answers under way:
the teacher sends whole logits of a large vocabulary, 32 MiB for a micro-batch.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from bitdistill_ray.train import run
from tests.integration.curves import TEXT, overrides_of, refined, rows_of, same_rows
from tests.road import tiny_config, tiny_overrides
from tests.tiny_models import save_tiny

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SCRIPT_S = 400
LARGE = ("stages.distill.loss.gamma=0.5", "teacher.payload=logits", "teacher.in_flight=4", "teacher.timeout_s=120",
         "student.max_failures=1", "monitor.report=false")  # fmt: skip


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Path:
    """The folder of an uninterrupted run with large answers, in an object store that holds them."""
    root = tmp_path_factory.mktemp("large")
    (root / "corpus.jsonl").write_text(TEXT)
    save_tiny(root / "teacher-llama", vocab_size=1 << 17)
    run(tiny_config(root, *overrides_of(root), *LARGE, run=str(root / "alone")))
    return root / "alone"


@pytest.fixture
def victim(large: Path, request: pytest.FixtureRequest) -> Path:
    """A run folder whose `refine` stage is finished."""
    return refined(large, request.node.name)


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    """Where a Ray of a test keeps its files: a short path, since sockets lie in it."""
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        yield Path(folder)


def script(code: str, folder: Path, ray_folder: Path, *overrides: str, **environment: str) -> str:
    """Run `code` with the command's arguments in a process of its own; what it printed, also where it hangs."""
    arguments = tiny_overrides(folder.parent, *overrides_of(folder.parent), *LARGE, *overrides, run=str(folder))
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    log = ray_folder / "said"
    with log.open("wb") as file:
        process = subprocess.Popen([sys.executable, "-c", code, str(folder), *arguments], stdout=file,
                                   stderr=subprocess.STDOUT, start_new_session=True,
                                   env={**inherited, "RAY_TMPDIR": str(ray_folder), "RAY_AUTH_MODE": "disabled",
                                        **environment})  # fmt: skip
        try:
            process.wait(SCRIPT_S)
        except subprocess.TimeoutExpired:
            pytest.fail(f"not over after {SCRIPT_S} s; it said:\n{log.read_text()}")
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, log.read_text()
    return log.read_text()


NODES = """
import pathlib, sys, time
from concurrent.futures import ThreadPoolExecutor
import ray
from ray._private.internal_api import memory_summary
from ray.cluster_utils import Cluster
from bitdistill_ray.stages import training
from bitdistill_ray.train import main
from tests.integration.disturbed import on_nodes_that_go

folder, store, cpus = pathlib.Path(sys.argv[1]), 78 << 20, {"teacher": 3, "student": 2}
cluster = Cluster()
cluster.add_node(num_cpus=1, object_store_memory=store, include_dashboard=False)
ray.init(address=cluster.address, log_to_driver=False)
nodes = {name: cluster.add_node(num_cpus=count, object_store_memory=store) for name, count in cpus.items()}
training.train_worker = on_nodes_that_go
driver = ThreadPoolExecutor(1).submit(main, ["demo", *sys.argv[2:]])  # Cluster wants the main thread
for name, node in nodes.items():
    while not (folder / name).exists() and not driver.done():
        time.sleep(0.1)
    if not driver.done():
        cluster.remove_node(node, allow_graceful=False)
        cluster.add_node(num_cpus=cpus[name], object_store_memory=store)
        (folder / f"{name} went").touch()
status = driver.result()
print(memory_summary(stats_only=True))
ray.shutdown()
cluster.shutdown()
sys.exit(status)
"""


def test_nodes_that_are_removed_and_stores_that_overflow_leave_the_same_rows(
    large: Path, victim: Path, ray_folder: Path
) -> None:
    """The teacher's node goes with the answers in its store, later the student's; no store holds all that is asked."""
    said = script(NODES, victim, ray_folder, "teacher.cpus=3", "student.cpus=2")
    assert (victim / "teacher went").exists()
    assert (victim / "student went").exists()
    assert re.search(r"teacher 0 was lost \(\w+\): asking another", said), said
    assert "resumes at step" in said
    assert re.search(r"Spilled [1-9]\d* MiB", said), said
    same_rows(victim, large)


FULL = """
import sys
import numpy, ray
from bitdistill_ray.train import main

ray.init(address="local", num_cpus=4, object_store_memory=78 << 20, include_dashboard=False, log_to_driver=False)
held = ray.get(ray.put(numpy.zeros(56 << 20, numpy.uint8)))  # in use, so that it can neither be dropped nor spilled
print("ended with", main(["demo", *sys.argv[2:]]), flush=True)
del held
sys.exit(main(["demo", *sys.argv[2:]]))
"""


@pytest.mark.soak
def test_a_full_object_store_that_cannot_spill_is_named_and_with_room_for_one_answer_the_rows_are_the_same(
    large: Path, victim: Path, ray_folder: Path
) -> None:
    """Ray spills to no disk that is over its threshold: here any.  First no answer has room, then some of four."""
    said = script(FULL, victim, ray_folder, RAY_local_fs_capacity_threshold="0.0001")
    error = "error: teacher: teacher 0 had no room for its answer: its node's object store is full, and so is the disk"
    assert re.search(rf"{error} .*; 3 attempts failed\. Lower teacher\.in_flight.*\nended with 2\n", said), said
    assert sum(row["retries"] for row in rows_of(victim)) > 0
    same_rows(victim, large)
