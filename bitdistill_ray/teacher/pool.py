"""The teacher pool: starts its registry, or joins one by name, and hands it to the students as a Roster.

A run's own pool is owned by the driver and goes when it goes.  A named pool belongs to nobody: its registry is a
detached actor in the namespace `NAMESPACE`, which any job of the cluster finds by name and which lives until
`TeacherPool.down`.  Both are the same registry (`registry.py`) and the same client (`client.py`).
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
import ray.util
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from transformers import AutoTokenizer

from bitdistill_ray.config import StorageConfig, TeacherConfig
from bitdistill_ray.errors import TeacherError
from bitdistill_ray.model.identity import ModelIdentity, tokenizer_hash
from bitdistill_ray.ray_errors import user_error
from bitdistill_ray.teacher.handshake import Offer, refuse_offer
from bitdistill_ray.teacher.registry import PoolStatus, Registry
from bitdistill_ray.teacher.roster import Roster

NAMESPACE = "bitdistill"
PREFIX = "teacher-pool/"
REGISTRY_S = 120.0  # for the registry's own process
ASK_S = 30.0


@dataclass(frozen=True, slots=True)
class TeacherPool:
    """Live teachers of one model.  `roster` may be sent to any task or actor."""

    roster: Roster
    identity: ModelIdentity
    config: TeacherConfig
    description: str
    name: str | None = None  # of a pool that outlives its users

    @classmethod
    def start(
        cls, source: str, config: TeacherConfig, storage: StorageConfig | None = None, *, name: str | None = None
    ) -> TeacherPool:
        """Start `config.actors` teachers of `source` and wait until all have loaded the same model.

        With a `name` they outlive this process, and other jobs may `join` them.

        Raises:
            TeacherError: an actor could not be placed or load in `timeout_s`, two loaded different weights, or the
                name is taken.
        """
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        options: dict[str, Any] = {"num_cpus": 0, "max_restarts": -1, "scheduling_strategy": here}
        if name is not None:
            options |= {"name": PREFIX + name, "namespace": NAMESPACE, "lifetime": "detached"}
        try:
            registry = ray.remote(Registry).options(**options).remote(source, config, storage)
        except ValueError:  # Ray's, for a name that is taken
            raise TeacherError(f"teacher pool {name!r}", "is up already",
                               f"Join it, or end it with `bitdistill teacher down {name}`") from None  # fmt: skip
        try:
            identity, description = ray.get(registry.started.remote(), timeout=config.timeout_s + REGISTRY_S)
        except GetTimeoutError:
            _end(registry)
            raise TeacherError("teacher pool", f"did not start in {config.timeout_s + REGISTRY_S:.0f} s",
                               "See `ray status` and the log of the actor `Registry`") from None  # fmt: skip
        except RayError as error:
            _end(registry)
            raise user_error(error) or error from None
        except BaseException:  # Ctrl-C: a named pool must not stay half started
            ray.kill(registry)
            raise
        return cls(_roster(registry, config), identity, config, description, name)

    @classmethod
    def join(cls, name: str, source: str, config: TeacherConfig, *, tokenizer: str | None = None) -> TeacherPool:
        """The pool `name`, which must serve what a run with this `source` and `config` asks for.

        `tokenizer`: where the student's is, to be compared.

        Raises:
            TeacherError: no such pool, one that differs (`handshake.py`), or one without a teacher.
        """
        registry = _find(name)
        offer: Offer = _ask(registry.offer.remote(), name, config.timeout_s)
        found = None if tokenizer is None else tokenizer_hash(AutoTokenizer.from_pretrained(tokenizer))
        refuse_offer(name, offer, source=source, config=config, tokenizer=found)
        return cls(_roster(registry, config), offer.identity, config, offer.description, name)

    @classmethod
    def open(
        cls, source: str, config: TeacherConfig, storage: StorageConfig | None = None, *, tokenizer: str | None = None
    ) -> TeacherPool:
        """What a stage does: `join` the pool that `config.join` names, else `start` one."""
        if config.join is not None:
            return cls.join(config.join, source, config, tokenizer=tokenizer)
        return cls.start(source, config, storage)

    @classmethod
    def status_of(cls, name: str) -> PoolStatus:
        """What the registry of the pool `name` knows.

        Raises:
            TeacherError: there is no such pool, or it is silent.
        """
        found: PoolStatus = _ask(_find(name).status.remote(), name, ASK_S)
        return found

    @classmethod
    def down(cls, name: str) -> None:
        """End the pool `name` and its teachers, whoever uses it.

        Raises:
            TeacherError: there is no such pool.
        """
        _end(_find(name))

    @property
    def handles(self) -> tuple[Any, ...]:
        """Actor handles of the teachers that take questions now.

        Raises:
            TeacherError: there is none, and none came in `timeout_s`.
        """
        return tuple(self.roster.await_teachers(self.config.timeout_s).teachers.values())

    def status(self) -> PoolStatus:
        """What the registry knows.

        Raises:
            TeacherError: it is silent, or is being started again.
        """
        found: PoolStatus = _ask(self.roster.registry.status.remote(), self.name or "of this run", ASK_S)
        return found

    def scale(self, teachers: int) -> None:
        """Want so many teachers, within the pool's bounds."""
        _ask(self.roster.registry.scale.remote(teachers), self.name or "of this run", ASK_S)

    def shutdown(self) -> None:
        """End the teachers of a pool without a name; a named one stays."""
        if self.name is None:
            _end(self.roster.registry)


def _roster(registry: Any, config: TeacherConfig) -> Roster:
    first = Roster(registry=registry).await_teachers(config.timeout_s)
    return Roster(first, registry)


def _find(name: str) -> Any:
    try:
        return ray.get_actor(PREFIX + name, namespace=NAMESPACE)
    except ValueError:  # Ray's, for a name that nobody has
        actors = ray.util.list_named_actors(all_namespaces=True)
        up = [a["name"].removeprefix(PREFIX) for a in actors if a["namespace"] == NAMESPACE]
        raise TeacherError(f"teacher pool {name!r}", f"is not up on this cluster (up: {', '.join(up) or 'none'})",
                           f"Start it with `bitdistill teacher up {name}`, and see RAY_ADDRESS") from None  # fmt: skip


def _ask(answer: Any, name: str, timeout_s: float) -> Any:
    try:
        return ray.get(answer, timeout=timeout_s)
    except GetTimeoutError:
        raise TeacherError(f"teacher pool {name!r}", f"gave no answer in {timeout_s:.0f} s",
                           "See `ray status` and the log of the actor `Registry`") from None  # fmt: skip
    except RayError as error:
        raise user_error(error) or TeacherError(f"teacher pool {name!r}", f"was lost ({type(error).__name__})",
                                                "Try again: Ray is starting it again") from None  # fmt: skip


def _end(registry: Any) -> None:
    with suppress(RayError):  # if it is silent, the teachers end with their owner
        ray.get(registry.close.remote(), timeout=ASK_S)
    ray.kill(registry)
