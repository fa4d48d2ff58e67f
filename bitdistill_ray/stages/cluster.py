"""Running a stage's heavy part on the cluster instead of in the driver, which may sit on a head node without CPUs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import ray
import torch
from ray.exceptions import RayError

from bitdistill_ray import env
from bitdistill_ray.errors import ResourceError
from bitdistill_ray.ray_errors import user_error
from bitdistill_ray.stages.base import StageContext
from bitdistill_ray.stages.notes import Notes, shown_notes
from bitdistill_ray.stages.room import Room

Result = TypeVar("Result")
Work = Callable[[StageContext, Notes], Result]
LOOK_EVERY_S = 1.0


def on_cluster(function: Work[Result], context: StageContext) -> Result:
    """`function(context, notes)` as one Ray task with the resources of a student worker; its own errors come back."""
    return on_cluster_each([function], context)[0]


def on_cluster_each(functions: Sequence[Work[Result]], context: StageContext) -> list[Result]:
    """The same with a task for each function, side by side as far as there is room."""
    resources = context.config.student
    task = ray.remote(_with_threads).options(num_cpus=resources.cpus, num_gpus=resources.gpus)
    with shown_notes(context.name) as notes:
        answers = [task.remote(function, context, notes, resources.threads) for function in functions]
        try:
            _wait_for_room(answers, notes, Room(resources, len(answers)))
            results: list[Result] = ray.get(answers)
        except (RayError, ResourceError) as error:
            cancel_unfinished(answers)
            raise user_error(error) or error from None
    return results


def cancel_unfinished(tasks: list[Any]) -> None:
    """Cancel those of `tasks` that run or wait.

    Cancelling one that has just failed takes the driver down without a word: its reply is still being counted then, and
    Ray's core dies of a task that "was not pending".
    """
    for task in ray.wait(tasks, num_returns=len(tasks), timeout=0)[1]:
        ray.cancel(task)


def _wait_for_room(tasks: list[Any], notes: Notes, room: Room) -> None:
    """Return when one of `tasks` runs, or has run: the others take its place when it ends.

    Raises:
        ResourceError: all of them still wait for room after `student.start_timeout_s`.
    """
    deadline = time.monotonic() + room.student.start_timeout_s
    while not ray.wait(tasks, timeout=LOOK_EVERY_S)[0] and not ray.get(notes.board.has_begun.remote()):
        line = room.line(waiting=True)
        if line:
            notes.say(line)
        if time.monotonic() > deadline:
            raise room.error()


def _with_threads(function: Work[Result], context: StageContext, notes: Notes, threads: int | None) -> Result:
    """Ray gives a task as many threads as CPUs; a task that has the node to itself may use them all."""
    notes.begin()
    torch.set_num_threads(threads or env.cpu_count())
    return function(context, notes)
