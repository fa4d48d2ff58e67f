"""Who the teachers are at this moment: what the pool's registry tells its clients, and what they tell it.

Everything here is plain data, sent between processes.  A `Roster` is how a pool is handed to a student: the teachers of
the moment and the registry that knows the later ones.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError

from bitdistill_ray.errors import TeacherError
from bitdistill_ray.ray_errors import user_error
from bitdistill_ray.teacher.recovery import PAUSE_S


@dataclass(frozen=True, slots=True)
class Membership:
    """The teachers that take questions, by number.  `version` grows with every change, whoever keeps the registry."""

    version: int = 0
    teachers: Mapping[int, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # lines for the log that this job has not been told yet


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One client's word to the registry: which membership it knows, how long it waited, what it has under way."""

    client: str
    job: str
    version: int
    seconds: float  # since its last report
    waited_s: float  # of these, for teachers
    outstanding: Mapping[int, int]  # unanswered questions by teacher


@dataclass(frozen=True, slots=True)
class Roster:
    """A pool as its users know it.  Without a registry it is a fixed set of teachers."""

    first: Membership = field(default_factory=Membership)
    registry: Any = None

    @classmethod
    def of(cls, teachers: Roster | Sequence[Any]) -> Roster:
        """The same roster, or one of the actor handles `teachers`."""
        return teachers if isinstance(teachers, Roster) else cls(Membership(0, dict(enumerate(teachers))))

    def now(self, timeout_s: float) -> Membership | None:
        """The membership of this moment, or None where the registry is being started again or silent."""
        if self.registry is None:
            return self.first
        try:
            membership: Membership = ray.get(self.registry.membership.remote(), timeout=timeout_s)
        except (RayActorError, GetTimeoutError):
            return None
        return membership

    def await_teachers(self, timeout_s: float) -> Membership:
        """The membership as soon as it has a teacher.

        Raises:
            TeacherError: none in `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        while (left := deadline - time.monotonic()) > 0:
            membership = self.now(left)
            if membership is not None and membership.teachers:
                return membership
            time.sleep(PAUSE_S)
        raise TeacherError("teacher", f"the pool had no teacher for {timeout_s:.0f} s",
                           "See `bitdistill teacher status` or the teachers' logs")  # fmt: skip

    def call(self, method: str, *arguments: Any, timeout_s: float) -> Any:
        """What any one teacher answers; a teacher that is lost meanwhile leaves the question to the next.

        Raises:
            TeacherError: no answer in `timeout_s`.
        """
        deadline, turn, reason = time.monotonic() + timeout_s, 0, "no teacher was there"
        while (left := deadline - time.monotonic()) > 0:
            teachers = list(self.await_teachers(left).teachers.values())
            try:
                return ray.get(
                    getattr(teachers[turn % len(teachers)], method).remote(*arguments),
                    timeout=max(0.0, deadline - time.monotonic()),
                )
            except RayActorError as error:
                turn, reason = turn + 1, f"the last one asked was lost ({type(error).__name__})"
                time.sleep(PAUSE_S)
            except GetTimeoutError:
                reason = "the teacher is silent"
            except RayError as error:
                raise user_error(error) or error from None
        raise TeacherError("teacher", f"no answer to {method!r} in {timeout_s:.0f} s: {reason}",
                           "See the teachers' logs, or raise teacher.timeout_s")  # fmt: skip
