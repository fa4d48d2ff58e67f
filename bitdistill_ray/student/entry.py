"""The function that Ray Train runs in every student worker.

Ray Train's controller, a process of its own, imports the module of this function before it starts the workers, and then
each worker does: so this one imports nothing heavy before it runs (torch, DeepSpeed and transformers take seven seconds
of a CPU, which every start of a run would wait for twice).
"""

from __future__ import annotations

import ray

from bitdistill_ray.errors import BitdistillError
from bitdistill_ray.student.job import TrainJob


def train_worker(settings: dict[str, TrainJob]) -> None:
    """Train as `settings["job"]` says; what the user can mend is told to the monitor.

    Where something was refused before, this returns, as if it had trained: raising would have Ray Train try again.
    """
    from bitdistill_ray.student.preemption import PreemptedError
    from bitdistill_ray.student.worker import Worker

    job = settings["job"]
    if ray.get(job.monitor.refusal.remote()) is not None:
        return
    try:
        Worker(job).run()
    except PreemptedError:
        if not ray.get(job.monitor.is_stopping.remote()):
            raise
        # else the driver goes too, and no attempt is to follow
    except BitdistillError as error:
        if ray.get(job.monitor.refuse.remote(error)):
            raise
