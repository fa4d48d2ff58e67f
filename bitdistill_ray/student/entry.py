"""The function that Ray Train runs in every student worker.

Ray Train's controller, a process of its own, imports the module of this function before it starts the workers, and then
each worker does: so this one imports nothing heavy before it runs (torch, DeepSpeed and transformers take seven seconds
of a CPU, which every start of a run would wait for twice).
"""

from __future__ import annotations

from collections.abc import Callable

import ray

from bitdistill_ray.errors import BitdistillError
from bitdistill_ray.student.job import TrainJob


def train_worker(settings: dict[str, TrainJob]) -> None:
    """Train as `settings["job"]` says."""
    attempt(settings["job"], _train)


def attempt(job: TrainJob, train: Callable[[TrainJob], None]) -> None:
    """`train(job)`, once; what the user can mend is told to the monitor.

    Where something was refused before, and where the driver was told to go, this returns as if it had trained: raising
    would have Ray Train try again.
    """
    from bitdistill_ray.student.preemption import PreemptedError

    if ray.get(job.monitor.refusal.remote()) is not None:
        return
    try:
        train(job)
    except PreemptedError:
        if not ray.get(job.monitor.is_stopping.remote()):
            raise
    except BitdistillError as error:
        if ray.get(job.monitor.refuse.remote(error)):
            raise


def _train(job: TrainJob) -> None:
    from bitdistill_ray.student.worker import Worker

    Worker(job).run()
