"""A training stage in a process of its own, on Ray nodes of its own, while a fault happens to them.

    python -m tests.integration.lost_node FAULT RUN ROOT OVERRIDES…

node   the Ray node of the student worker is removed at once in its fifth step; a new, empty one joins
store  the object store is full of pinned objects before the stage begins

A real multi-node Ray on one machine (`ray.cluster_utils.Cluster`), apart from the Ray of the test session.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import numpy as np
import ray
from ray.cluster_utils import Cluster

from bitdistill_ray.stages import training
from bitdistill_ray.student.job import TrainJob
from bitdistill_ray.student.worker import Worker
from bitdistill_ray.train import run
from tests.road import tiny_config

STORE_BYTES = 80 << 20
NODE = {"num_cpus": 1, "object_store_memory": STORE_BYTES}


def standing_still(settings: dict[str, TrainJob]) -> None:
    """A worker that says on which node it is and waits, once in a run, in its fifth step."""
    worker = Worker(settings["job"])
    at = Path(worker.job.run.storage.url) / "student-node"
    take_step, taken = worker.engine.step, [0]

    def step() -> None:
        taken[0] += 1
        if taken[0] == 4 * worker.micros + 1 and not at.exists():
            at.write_text(ray.get_runtime_context().get_node_id())
            time.sleep(120)
            raise RuntimeError("the node was not removed")
        take_step()

    worker.engine.step = step
    worker.run()


def remove_the_students_node(cluster: Cluster, at: Path) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if at.exists() and (node_id := at.read_text()):
            node = next(n for n in cluster.worker_nodes if n.node_id == node_id)
            cluster.remove_node(node, allow_graceful=False)
            cluster.add_node(wait=False, **NODE)
            print("removed the student's node", flush=True)
            return
        time.sleep(0.1)


def main(fault: str, folder: str, root: str, *overrides: str) -> None:
    config = tiny_config(Path(root), *overrides, run=folder)
    if fault == "store":
        ray.init(num_cpus=4, include_dashboard=False, object_store_memory=STORE_BYTES, log_to_driver=False)
        chunk = np.ones(4 << 20, np.uint8)
        ballast = [ray.get(ray.put(chunk)) for _ in range(STORE_BYTES // chunk.nbytes + 1)]  # views pin the objects
        run(config)
        print(f"ended beside {len(ballast)} pinned objects", flush=True)
        ray.shutdown()
        return
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "include_dashboard": False, "object_store_memory": STORE_BYTES},
    )
    try:
        for _ in range(2):
            cluster.add_node(**NODE)
        ray.init(address=cluster.address, log_to_driver=False)
        training.train_worker = standing_still
        threading.Thread(
            target=remove_the_students_node, args=(cluster, Path(folder) / "student-node"), daemon=True
        ).start()
        run(config)
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
