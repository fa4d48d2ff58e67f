"""The student's side of the service: a bounded window of questions in flight, balanced, retried, checked.

`ask` gives the teacher a *reference* to the batch, which may not have been computed yet: Ray hands it over when the
feeder has it, and the student waits for nothing.  `answer` returns the signals in the order in which they were asked
for.  A teacher that dies or stays silent loses the question to another; an answer to another question is refused.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError

from bitdistill_ray.core import TeacherSignals
from bitdistill_ray.data.batch import BatchArrays
from bitdistill_ray.errors import TeacherError
from bitdistill_ray.teacher import wire
from bitdistill_ray.teacher.recovery import await_restart
from bitdistill_ray.teacher.request import SignalRequest


@dataclass(slots=True)
class Ticket:
    """One question: its batch, who has it, how often it was asked."""

    batch: Any
    teacher: int
    answer: Any
    attempt: int = 1


class TeacherClient:
    """Asks a pool of teachers on behalf of one student.

    Counters for the log: `waited_s` (time in `answer`), `received_bytes`, `retries`; `take_counters` reads and clears.
    """

    def __init__(
        self,
        handles: Sequence[Any],
        request: SignalRequest,
        *,
        timeout_s: float,
        attempts: int,
        first: int = 0,
        say: Callable[[str], object] = print,
    ) -> None:
        self.say = say
        self.handles, self.request, self.timeout_s, self.attempts = list(handles), request, timeout_s, attempts
        self.outstanding = [0] * len(self.handles)
        self.next = first  # students start on different teachers
        self.waited_s, self.received_bytes, self.retries = 0.0, 0, 0

    def ask(self, batch: Any) -> Ticket:
        """Send `batch` (BatchArrays, or a reference to some) to the least busy teacher; returns at once."""
        teacher = self._least_busy()
        return Ticket(batch, teacher, self._send(batch, teacher))

    def answer(self, ticket: Ticket, arrays: BatchArrays, device: torch.device | str = "cpu") -> TeacherSignals:
        """Wait for the answer to `ticket` and check that it is about the batch `arrays`.

        Raises:
            TeacherError: no teacher answered in `attempts` x `timeout_s`, or the answer is about something else.
        """
        began = time.perf_counter()
        message = self._wait(ticket)
        self.waited_s += time.perf_counter() - began
        self.received_bytes += wire.payload_bytes(message)
        wire.check_answer(message, arrays)
        return wire.decode_signals(message, device)

    def take_counters(self) -> dict[str, float]:
        """Counters since the last call."""
        counters = {"teacher_wait_s": self.waited_s, "teacher_bytes": self.received_bytes, "retries": self.retries}
        self.waited_s, self.received_bytes, self.retries = 0.0, 0, 0
        return counters

    def _wait(self, ticket: Ticket) -> wire.Message:
        while True:
            lost = False
            try:
                message: wire.Message = ray.get(ticket.answer, timeout=self.timeout_s)
            except (RayActorError, ObjectLostError) as error:
                lost = True
                reason = f"teacher {ticket.teacher} was lost ({type(error).__name__})"
            except GetTimeoutError:
                reason = f"teacher {ticket.teacher} gave no answer in {self.timeout_s:.0f} s"
            else:
                self.outstanding[ticket.teacher] -= 1
                return message
            self.outstanding[ticket.teacher] -= 1
            if ticket.attempt >= self.attempts:
                raise TeacherError("teacher", f"{reason}; {ticket.attempt} attempts failed",
                                   "See the teachers' logs, or raise teacher.timeout_s")  # fmt: skip
            self.retries += 1
            ticket.attempt += 1
            ticket.teacher = self._least_busy(avoid=ticket.teacher)
            self.say(f"{reason}: asking teacher {ticket.teacher} (attempt {ticket.attempt} of {self.attempts})")
            if lost:
                await_restart(self.handles[ticket.teacher], self.timeout_s)
            ticket.answer = self._send(ticket.batch, ticket.teacher)

    def _send(self, batch: Any, teacher: int) -> Any:
        self.outstanding[teacher] += 1
        return self.handles[teacher].score.remote(batch, self.request)

    def _least_busy(self, avoid: int | None = None) -> int:
        count = len(self.handles)
        order = [(self.next + i) % count for i in range(count)]
        self.next = (self.next + 1) % count
        return min((t for t in order if t != avoid or count == 1), key=lambda t: self.outstanding[t])
