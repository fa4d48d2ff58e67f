"""Work that waits for room in the cluster: it says so, and what gave up says what was missing.

Ray queues what it cannot place, for ever and without a word: a cluster that is adding a node looks like one that never
will have enough.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import ray
import ray.util

from bitdistill_ray.config import StudentConfig
from bitdistill_ray.errors import ResourceError

SAY_EVERY_S = 30.0


@dataclass(slots=True)
class Room:
    """Room for `count` processes with the resources of a student worker each."""

    student: StudentConfig
    count: int
    since: float | None = None  # when the waiting began
    said_at: float = field(default_factory=time.monotonic)

    @property
    def waits(self) -> bool:
        """Whether it waited when `line` was last asked."""
        return self.since is not None

    def line(self, *, waiting: bool | None) -> str | None:
        """What to tell the user now, every `SAY_EVERY_S` of waiting; None is no news of whether it waits."""
        now = time.monotonic()
        if waiting is False:
            self.since, self.said_at = None, now
        if waiting:
            self.since = self.since or now
        if self.since is None or now - self.said_at < SAY_EVERY_S:
            return None
        self.said_at = now
        return f"waiting for room for {now - self.since:.0f} s: {self.missing()}"

    def missing(self) -> str:
        """What is asked for, and what there is."""
        free, there, asked = ray.available_resources(), ray.cluster_resources(), self.student.resources
        wanted = ", ".join(f"{name} {amount:g}" for name, amount in asked.items())
        found = ", ".join(f"{name} {free.get(name, 0):g} of {there.get(name, 0):g}" for name in asked)
        shares = "; a share of a GPU must fit on one card" if self.student.gpus % 1 else ""
        return f"{self.count} x ({wanted}) asked for, free: {found}{shares}"

    def error(self) -> ResourceError:
        """To raise when `student.start_timeout_s` are over."""
        return ResourceError("student", f"no room for {self.student.start_timeout_s:g} s: {self.missing()}",
                             "Ask for less (student.workers, student.gpus, student.cpus, teacher.gpus), give the "
                             "cluster more, or raise student.start_timeout_s")  # fmt: skip


def placing() -> bool | None:
    """Whether a placement group of this job waits for room; None where there is no group."""
    job = ray.get_runtime_context().get_job_id()  # the last bytes of its groups' ids
    states = {group["state"] for id_, group in ray.util.placement_group_table().items() if id_.endswith(job)}
    return "PENDING" in states if states & {"PENDING", "CREATED"} else None
