"""The teacher pool: places the actors, shakes hands with them, and hands their handles to the students.

The driver owns the actors, so they go when it goes.  Ray restarts one that dies (`max_restarts=-1`); the request that
it was answering is repeated by the student that asked (`client.py`), on whichever teacher is least busy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from bitdistill_ray.config import StorageConfig, TeacherConfig
from bitdistill_ray.errors import TeacherError
from bitdistill_ray.model.identity import ModelIdentity
from bitdistill_ray.ray_errors import user_error
from bitdistill_ray.teacher.actor import Teacher


@dataclass(frozen=True, slots=True)
class TeacherPool:
    """Live teachers of one model.  `handles` may be sent to any task or actor."""

    handles: tuple[Any, ...]
    identity: ModelIdentity
    config: TeacherConfig
    description: str

    @classmethod
    def start(cls, source: str, config: TeacherConfig, storage: StorageConfig | None = None) -> TeacherPool:
        """Start `config.actors` teachers of `source` and wait until all have loaded the same model.

        Raises:
            TeacherError: an actor could not be placed or load in `timeout_s`, or two loaded different weights.
        """
        remote = ray.remote(Teacher).options(
            num_cpus=config.cpus, num_gpus=config.gpus, max_restarts=-1, max_task_retries=0
        )
        handles = tuple(
            remote.remote(source, dtype=config.dtype, threads=config.threads, storage=storage)
            for _ in range(config.actors)
        )
        try:
            identities: list[ModelIdentity] = ray.get([h.handshake.remote() for h in handles], timeout=config.timeout_s)
            description: str = ray.get(handles[0].describe.remote(), timeout=config.timeout_s)
        except GetTimeoutError:
            cls._kill(handles)
            raise TeacherError("teacher", f"{config.actors} x ({config.cpus} CPUs, {config.gpus} GPUs) did not start "
                               f"in {config.timeout_s:.0f} s", "Lower teacher.actors, cpus or gpus to what `ray status`"
                               " shows, or raise teacher.timeout_s") from None  # fmt: skip
        except RayError as error:
            cls._kill(handles)
            raise user_error(error) or error from None
        if len(set(identities)) > 1:
            cls._kill(handles)
            raise TeacherError("teacher", f"the actors loaded different weights from {source}",
                               "Pin the model's revision, or use one folder that all nodes see")  # fmt: skip
        return cls(handles, identities[0], config, description)

    def shutdown(self) -> None:
        """End the actors."""
        self._kill(self.handles)

    @staticmethod
    def _kill(handles: Sequence[Any]) -> None:
        for handle in handles:
            ray.kill(handle)
