"""What a student reads: its share of every step's batch, and what the teachers said about it, always a little ahead.

Batches of whole steps are asked for early, since they are small.  Questions go to the teachers in order, at most
`in_flight` unanswered at a time, each with a reference to its batch, so the student waits neither for the feeder nor
for a teacher until it needs their answer.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, cast

import ray
import torch
from ray.exceptions import RayError

from bitdistill_ray.cache.client import CachedTeacher
from bitdistill_ray.core import TeacherSignals
from bitdistill_ray.data.batch import BatchArrays
from bitdistill_ray.errors import DataError
from bitdistill_ray.ray_errors import user_error

STEPS_AHEAD = 2
SAY_EVERY_S = 30.0


class Answers(Protocol):
    """Where a student's answers come from: the teachers (`TeacherClient`), or a cache before them (`CachedTeacher`)."""

    def ask(self, batch: Any) -> Any:
        """A ticket for the answer about `batch` (BatchArrays, or a reference to some); returns at once."""
        ...

    def answer(self, ticket: Any, arrays: BatchArrays, device: torch.device | str = "cpu") -> TeacherSignals:
        """The answer to a ticket, which is about `arrays`; tickets in the order in which they were given."""
        ...

    def take_up(self, ticket: Any, device: torch.device | str = "cpu") -> None:
        """Begin to copy the answer to a ticket to `device`, if it is there already."""
        ...

    def take_counters(self) -> dict[str, float]:
        """Counters for the log, since the last call."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """Which part of every step is this worker's."""

    rank: int
    ranks: int
    micros: int


class Inbox:
    """Steps `first` to `steps` - 1, in order.

    `data_wait_s` counts the time spent waiting for the feeder; `sequences` says, on rank 0, which sequences the step
    under way consumes (`Feeder.sequences`).
    """

    def __init__(
        self,
        feeder: Any,
        client: Answers | None,
        share: Share,
        *,
        first: int,
        steps: int,
        in_flight: int,
        timeout_s: float = math.inf,
        say: Callable[[str], object] = print,
    ) -> None:
        self.feeder, self.client, self.share, self.in_flight = feeder, client, share, in_flight
        self.unasked: deque[Any] = deque()
        self.tickets: deque[Any] = deque()
        self.ahead: deque[list[Any]] = deque()
        self.next, self.steps = first, steps
        self.data_wait_s, self.timeout_s, self.say = 0.0, timeout_s, say
        self.identities: deque[Any] = deque()
        self.sequences: dict[str, Any] = {}

    def __iter__(self) -> Iterator[list[BatchArrays]]:
        """The micro-batches of each step; ask `signals` for each of them, in order, before the next step."""
        while True:
            self._look_ahead()
            if not self.ahead:
                if isinstance(self.client, CachedTeacher):
                    self.client.finish()
                return
            began = time.perf_counter()
            try:
                arrays: list[BatchArrays] = self._wait(self.ahead.popleft())
                if self.identities:
                    self.sequences = ray.get(self.identities.popleft())
            except RayError as error:
                raise user_error(error) or error from None
            self.data_wait_s += time.perf_counter() - began
            yield arrays

    def _wait(self, refs: list[Any]) -> list[BatchArrays]:
        """The batches, waited for aloud."""
        began = time.monotonic()
        while len(ray.wait(refs, num_returns=len(refs), timeout=min(SAY_EVERY_S, self.timeout_s))[0]) < len(refs):
            waited = time.monotonic() - began
            free, all_there = (found().get("CPU", 0) for found in (ray.available_resources, ray.cluster_resources))
            state = f"no batch for {waited:.0f} s, {free:g} of the cluster's {all_there:g} CPUs are free"
            if waited >= self.timeout_s:
                raise DataError("data", state, "Give the cluster a CPU more than teachers and students take (readers "
                                "need one), or raise data.timeout_s")  # fmt: skip
            if self.share.rank == 0:
                self.say(f"waiting for data: {state}; readers need one")
        return cast(list[BatchArrays], ray.get(refs))

    def signals(self, arrays: BatchArrays, device: torch.device) -> TeacherSignals | None:
        """What the teacher says about the next micro-batch, `arrays`; None where no teacher is asked."""
        if self.client is None:
            return None
        answer = self.client.answer(self.tickets.popleft(), arrays, device)
        self._ask()
        return answer

    def take_up(self, device: torch.device) -> None:
        """Begin to copy the next answer, if it is there, while `device` works through what it was given."""
        if self.client is not None and self.tickets:
            self.client.take_up(self.tickets[0], device)

    def _look_ahead(self) -> None:
        while self.next < self.steps and len(self.ahead) < STEPS_AHEAD:
            share = self.share
            refs = [
                self.feeder.batch.remote(
                    self.next, rank=share.rank, ranks=share.ranks, micro=micro, micros=share.micros
                )
                for micro in range(share.micros)
            ]
            self.ahead.append(refs)
            if share.rank == 0:
                self.identities.append(self.feeder.sequences.remote(self.next))
            self.unasked.extend(refs)
            self.next += 1
        self._ask()

    def _ask(self) -> None:
        while self.client is not None and self.unasked and len(self.tickets) < self.in_flight:
            self.tickets.append(self.client.ask(self.unasked.popleft()))
