"""Running a stage's heavy part on the cluster instead of in the driver, which may sit on a head node without CPUs."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import ray
import torch
from ray.exceptions import RayError

from bitdistill_ray import env
from bitdistill_ray.ray_errors import user_error
from bitdistill_ray.sigterm import sigterm_calls
from bitdistill_ray.stages.base import StageContext
from bitdistill_ray.stages.notes import Notes, shown_notes

Result = TypeVar("Result")


def on_cluster(function: Callable[[StageContext, Notes], Result], context: StageContext) -> Result:
    """`function(context, notes)` as one Ray task with the resources of a student worker; its own errors come back."""
    resources = context.config.student
    task = ray.remote(_with_threads).options(num_cpus=resources.cpus, num_gpus=resources.gpus)
    try:
        with shown_notes(context.name) as notes:
            result: Result = ray.get(task.remote(function, context, notes, resources.threads))
    except RayError as error:
        raise user_error(error) or error from None
    return result


def _with_threads(
    function: Callable[[StageContext, Notes], Result], context: StageContext, notes: Notes, threads: int | None
) -> Result:
    """Ray gives a task as many threads as CPUs; a task that has the node to itself may use them all."""
    torch.set_num_threads(threads or env.cpu_count())
    return function(context, notes)


def interruptible(function: Callable[[], Result], *, on_sigterm: Callable[[], object]) -> Result:
    """`function()` in a thread of its own, so that Ctrl-C stays a KeyboardInterrupt of this one.

    The first SIGTERM meanwhile calls `on_sigterm()`, which should make `function` return soon.

    For `trainer.fit`, which on the main thread replaces the handler of SIGINT by one that ends the process with
    status 1 and no word.  The thread ends with the Ray that it waits for.
    """
    pool = ThreadPoolExecutor(1, "trainer")
    outcome = pool.submit(function)
    pool.shutdown(wait=False)
    with sigterm_calls(on_sigterm):
        return outcome.result()
