"""The student's side of the service: a bounded window of questions in flight, balanced, retried, checked.

`ask` gives the teacher a *reference* to the batch, which may not have been computed yet: Ray hands it over when the
feeder has it, and the student waits for nothing.  `answer` returns the signals in the order in which they were asked
for.  A teacher that dies or stays silent loses the question to another; an answer to another question is refused.

The pool may change meanwhile.  Every `REPORT_S` the client tells the registry how long it waited and what it has under
way, and takes up what the registry said to the report before: it never waits for that, except when a teacher is lost.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError

from bitdistill_ray.core import TeacherSignals
from bitdistill_ray.data.batch import BatchArrays
from bitdistill_ray.errors import TeacherError
from bitdistill_ray.ray_errors import MORE_STORE, STORE_FULL
from bitdistill_ray.teacher import wire
from bitdistill_ray.teacher.landing import Landing
from bitdistill_ray.teacher.recovery import PAUSE_S, is_ready
from bitdistill_ray.teacher.request import SignalRequest
from bitdistill_ray.teacher.roster import Membership, Report, Roster

REPORT_S = 2.0
FULL_PAUSE_S = 1.0
FULL = "its node's object store is full, and so is the disk that it spills to"
SEE_LOGS = "See the teachers' logs, or raise teacher.timeout_s"


@dataclass(slots=True, eq=False)
class Ticket:
    """One question: its batch, the number of the teacher that has it, how often it was asked, what it said.

    `answer` is a reference.  Without one (and without `landing`) it was let go of, to be asked for again in its turn.
    """

    batch: Any
    teacher: int = -1
    answer: Any = None
    attempt: int = 1
    landing: Landing | None = None


class TeacherClient:
    """Asks a pool of teachers (a Roster, or plain actor handles) on behalf of one student.

    Counters for the log: `waited_s` (time in `answer`), `received_bytes`, `retries`; `take_counters` reads and clears.
    """

    def __init__(
        self,
        teachers: Roster | Sequence[Any],
        request: SignalRequest,
        *,
        timeout_s: float,
        attempts: int,
        first: int = 0,
        say: Callable[[str], object] = print,
    ) -> None:
        self.say = say
        self.roster, self.request, self.timeout_s, self.attempts = Roster.of(teachers), request, timeout_s, attempts
        self.membership = self.roster.first
        self.open: list[Ticket] = []
        self.outstanding: dict[int, int] = dict.fromkeys(self.membership.teachers, 0)
        self.next = first  # students start on different teachers
        self.waited_s, self.received_bytes, self.retries = 0.0, 0, 0
        self.name, self.job = uuid.uuid4().hex, ray.get_runtime_context().get_job_id()
        self.reported_at, self.unreported_wait_s = time.monotonic(), 0.0
        self.reply: Any = None
        self._report()

    def ask(self, batch: Any) -> Ticket:
        """Send `batch` (BatchArrays, or a reference to some) to the least busy teacher; returns at once.

        Raises:
            TeacherError: the pool had no teacher for `timeout_s`.
        """
        self.follow()
        ticket = Ticket(batch)
        self._ask(ticket)
        self.open.append(ticket)
        return ticket

    def answer(self, ticket: Ticket, arrays: BatchArrays, device: torch.device | str = "cpu") -> TeacherSignals:
        """Wait for the answer to `ticket` and check that it is about the batch `arrays`.

        Raises:
            TeacherError: no teacher answered in `attempts` x `timeout_s`, or the answer is about something else.
        """
        landing = ticket.landing or self._land(ticket, arrays, device)
        self.follow()
        return landing.take()

    def take_up(self, ticket: Ticket, device: torch.device | str = "cpu") -> None:
        """Begin to copy the answer to `device` if it is there; call this while the device computes something else."""
        if ticket.answer is not None and ray.wait([ticket.answer], timeout=0)[0]:
            arrays = ray.get(ticket.batch) if isinstance(ticket.batch, ray.ObjectRef) else ticket.batch
            ticket.landing = self._land(ticket, arrays, device)

    def take_counters(self) -> dict[str, float]:
        """Counters since the last call."""
        counters = {"teacher_wait_s": self.waited_s, "teacher_bytes": self.received_bytes, "retries": self.retries}
        self.waited_s, self.received_bytes, self.retries = 0.0, 0, 0
        return counters

    def follow(self) -> None:
        """Take up the registry's reply if it is there, and report again if it is time; waits for nothing."""
        if self.reply is not None and ray.wait([self.reply], timeout=0)[0]:
            reply, self.reply = self.reply, None
            with suppress(RayActorError):  # the registry is being started again: the next report finds it
                self._take_up(ray.get(reply))
        if self.reply is None and time.monotonic() - self.reported_at >= REPORT_S:
            self._report()

    def _report(self) -> None:
        if self.roster.registry is None:
            return
        now = time.monotonic()
        report = Report(client=self.name, job=self.job, version=self.membership.version, seconds=now - self.reported_at,
                        waited_s=self.unreported_wait_s, outstanding=dict(self.outstanding))  # fmt: skip
        self.reply, self.reported_at, self.unreported_wait_s = self.roster.registry.report.remote(report), now, 0.0

    def _take_up(self, membership: Membership) -> None:
        for note in membership.notes:
            self.say(note)
        if membership.version < self.membership.version:
            return
        self.membership = membership
        numbers = {n for n, count in self.outstanding.items() if count} | set(membership.teachers)
        self.outstanding = {n: self.outstanding.get(n, 0) for n in sorted(numbers)}

    def _land(self, ticket: Ticket, arrays: BatchArrays, device: torch.device | str) -> Landing:
        if ticket.answer is None:
            self._ask(ticket)
        message = self._wait(ticket)
        self.open.remove(ticket)
        self.received_bytes += wire.payload_bytes(message)
        wire.check_answer(message, arrays)
        landing, ticket.answer = Landing(message, torch.device(device)), None  # copied: the store may forget it
        return landing

    def _ask(self, ticket: Ticket) -> None:
        if not self.membership.teachers:
            self._take_up(self.roster.await_teachers(self.timeout_s))
        ticket.teacher = self._least_busy()
        ticket.answer = self._send(ticket.batch, ticket.teacher)

    def _wait(self, ticket: Ticket) -> wire.Message:
        while True:
            lost, remedy = False, SEE_LOGS
            try:
                message = self._get(ticket.answer)
            except (RayActorError, ObjectLostError) as error:
                lost = True
                reason = f"teacher {ticket.teacher} was lost ({type(error).__name__})"
            except STORE_FULL:
                reason, remedy = f"teacher {ticket.teacher} had no room for its answer: {FULL}", MORE_STORE
                self._make_room(ticket)
            except GetTimeoutError:
                reason = f"teacher {ticket.teacher} gave no answer in {self.timeout_s:.0f} s"
            else:
                self.outstanding[ticket.teacher] -= 1
                return message
            self.outstanding[ticket.teacher] -= 1
            if ticket.attempt >= self.attempts:
                raise TeacherError("teacher", f"{reason}; {ticket.attempt} attempts failed", remedy)
            self.retries += 1
            ticket.attempt += 1
            self.say(f"{reason}: asking another (attempt {ticket.attempt} of {self.attempts})")
            began = time.monotonic()
            ticket.teacher = self._another(ticket.teacher, reason, lost=lost)
            self._waited(time.monotonic() - began)
            ticket.answer = self._send(ticket.batch, ticket.teacher)

    def _make_room(self, ticket: Ticket) -> None:
        """Let go of all other answers under way, which might fill the store for ever while this one is waited for."""
        for other in self.open:
            if other is not ticket and other.answer is not None:
                self.outstanding[other.teacher] -= 1
                other.answer = None
        time.sleep(FULL_PAUSE_S)  # Ray frees them

    def _get(self, answer: Any) -> wire.Message:
        """`ray.get` within `timeout_s`, reporting meanwhile, so that a pool too small hears of it."""
        began = seen = time.monotonic()
        while True:
            left = began + self.timeout_s - seen
            ready, _ = ray.wait([answer], timeout=max(0.0, min(left, REPORT_S)))
            now = time.monotonic()
            self._waited(now - seen)
            seen = now
            if ready or left <= 0:
                message: wire.Message = ray.get(answer, timeout=0 if not ready else self.timeout_s)
                return message
            self.follow()

    def _waited(self, seconds: float) -> None:
        self.waited_s += seconds
        self.unreported_wait_s += seconds

    def _another(self, avoid: int, reason: str, *, lost: bool) -> int:
        """The least busy teacher of the pool as it is now, without `avoid` if there are others; alive where one was
        `lost`."""
        deadline = time.monotonic() + self.timeout_s
        while (left := deadline - time.monotonic()) > 0:
            membership = self.roster.now(left)
            if membership is not None:
                self._take_up(membership)
            if membership is None or not membership.teachers:
                time.sleep(PAUSE_S)
                continue
            chosen = self._least_busy(avoid)
            if not lost or is_ready(self.membership.teachers[chosen], left):
                return chosen
            avoid = chosen
        raise TeacherError("teacher", f"{reason}; no other was there in {self.timeout_s:.0f} s", SEE_LOGS)

    def _send(self, batch: Any, teacher: int) -> Any:
        self.outstanding[teacher] += 1
        return self.membership.teachers[teacher].score.remote(batch, self.request)

    def _least_busy(self, avoid: int | None = None) -> int:
        numbers = sorted(self.membership.teachers)
        order = [numbers[(self.next + i) % len(numbers)] for i in range(len(numbers))]
        self.next += 1
        return min((n for n in order if n != avoid or len(numbers) == 1), key=lambda n: self.outstanding[n])
