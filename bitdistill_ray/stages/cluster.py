"""Running a stage's heavy part on the cluster instead of in the driver, which may sit on a head node without CPUs."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import ray
import torch
from ray.exceptions import RayError

from bitdistill_ray import env
from bitdistill_ray.ray_errors import user_error
from bitdistill_ray.stages.base import StageContext
from bitdistill_ray.stages.notes import Notes, shown_notes
from bitdistill_ray.stages.room import Room

Result = TypeVar("Result")
LOOK_EVERY_S = 1.0


def on_cluster(function: Callable[[StageContext, Notes], Result], context: StageContext) -> Result:
    """`function(context, notes)` as one Ray task with the resources of a student worker; its own errors come back."""
    resources = context.config.student
    task = ray.remote(_with_threads).options(num_cpus=resources.cpus, num_gpus=resources.gpus)
    try:
        with shown_notes(context.name) as notes:
            answer = task.remote(function, context, notes, resources.threads)
            _wait_for_room(answer, notes, Room(resources, 1))
            result: Result = ray.get(answer)
    except RayError as error:
        raise user_error(error) or error from None
    return result


def _wait_for_room(task: Any, notes: Notes, room: Room) -> None:
    """Return when `task` runs, or has run.

    Raises:
        ResourceError: it still waits for room after `student.start_timeout_s`.
    """
    deadline = time.monotonic() + room.student.start_timeout_s
    while not ray.wait([task], timeout=LOOK_EVERY_S)[0] and not ray.get(notes.board.has_begun.remote()):
        line = room.line(waiting=True)
        if line:
            notes.say(line)
        if time.monotonic() > deadline:
            ray.cancel(task)
            raise room.error()


def _with_threads(
    function: Callable[[StageContext, Notes], Result], context: StageContext, notes: Notes, threads: int | None
) -> Result:
    """Ray gives a task as many threads as CPUs; a task that has the node to itself may use them all."""
    notes.begin()
    torch.set_num_threads(threads or env.cpu_count())
    return function(context, notes)


def begun(function: Callable[[], Result]) -> Future[Result]:
    """`function()` in a thread of its own, so that Ctrl-C stays a KeyboardInterrupt of this one.

    For `trainer.fit`, which on the main thread replaces the handler of SIGINT by one that ends the process with
    status 1 and no word.  The thread ends with the Ray that it waits for.
    """
    pool = ThreadPoolExecutor(1, "trainer")
    outcome = pool.submit(function)
    pool.shutdown(wait=False)
    return outcome
