"""Running a stage's heavy part on the cluster instead of in the driver, which may sit on a head node without CPUs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import ray
import torch
from ray.exceptions import RayError

from bitdistill_ray import env
from bitdistill_ray.config import StudentConfig
from bitdistill_ray.ray_errors import user_error

Result = TypeVar("Result")


def on_cluster(function: Callable[..., Result], *arguments: Any, resources: StudentConfig) -> Result:
    """`function(*arguments)` as one Ray task with the resources of a student worker; its own errors come back."""
    task = ray.remote(_with_threads).options(num_cpus=resources.cpus, num_gpus=resources.gpus)
    try:
        result: Result = ray.get(task.remote(function, resources.threads, *arguments))
    except RayError as error:
        raise user_error(error) or error from None
    return result


def _with_threads(function: Callable[..., Result], threads: int | None, *arguments: Any) -> Result:
    """Ray gives a task as many threads as CPUs; a task that has the node to itself may use them all."""
    torch.set_num_threads(threads or env.cpu_count())
    return function(*arguments)
