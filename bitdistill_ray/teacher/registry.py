"""The pool's registry: the one actor that knows which teachers there are, starts new ones and lets old ones go.

It owns the teachers, so they go when it goes, and whoever owns the registry (a run's driver, or nobody: a named pool)
owns the pool.  Ray restarts a teacher that dies; one that stays dead is replaced here.  If the registry itself dies,
its teachers go with it and Ray starts it again: it then starts its teachers anew, and clients find them through the
same handle.

A teacher that is let go is first taken off the list.  It ends when every client has said that it knows the new list and
has no question left with that teacher (or has been silent for `SILENT_S`), and when it has answered what it has.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayActorError, RayError

from bitdistill_ray.config import StorageConfig, TeacherConfig
from bitdistill_ray.errors import BitdistillError, TeacherError
from bitdistill_ray.model.identity import ModelIdentity, refuse_change
from bitdistill_ray.ray_errors import user_error
from bitdistill_ray.teacher.handshake import Offer
from bitdistill_ray.teacher.member import Member, MemberStatus, State
from bitdistill_ray.teacher.recovery import PAUSE_S
from bitdistill_ray.teacher.roster import Membership, Report
from bitdistill_ray.teacher.scaling import Bounds, Observation, decide
from bitdistill_ray.teacher.service import TeacherActor

TICK_S = 0.5
PROBE_S = 1.0
SILENT_S = 60.0
DEAD_PROBES = 3  # in a row, before a teacher counts as dead for good
RETRY_S = 10.0  # after a teacher that could not start


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolStatus:
    """What `bitdistill teacher status` shows.  `clients`: those heard from in the last `SILENT_S`."""

    source: str
    identity: ModelIdentity | None
    bounds: tuple[int, int]
    target: int
    members: tuple[MemberStatus, ...]
    clients: int
    notes: tuple[str, ...]


@dataclass(slots=True)
class _Client:
    report: Report
    heard_at: float
    seconds: float = 0.0  # of this window
    waited_s: float = 0.0


class Registry:
    """Starts `config.actors` teachers of `source` and keeps between `min_actors` and `max_actors`; see the module."""

    def __init__(self, source: str, config: TeacherConfig, storage: StorageConfig | None = None) -> None:
        self.source, self.config, self.storage = source, config, storage
        self.bounds = Bounds(config.least, config.most)
        self.target = config.actors
        self.version = time.time_ns()  # greater than any that a registry before this one gave
        self.members: dict[int, Member] = {}
        self.clients: dict[str, _Client] = {}
        self.identity: ModelIdentity | None = None
        self.description = ""
        self.refusal: BitdistillError | None = None
        self.notes: list[str] = []
        self.told: dict[str, int] = {}
        self.history: list[Observation] = []
        self.window_began = time.monotonic()
        self.count = 0
        self.complete = self.closed = False  # complete: all teachers of the start were there once
        self.retry_at = 0.0
        self.tasks: set[asyncio.Task[None]] = set()

    async def started(self) -> tuple[ModelIdentity, str]:
        """(identity of the model, one line about a teacher) once all teachers of the start take questions.

        Raises:
            TeacherError: they were not there in `timeout_s`, or loaded different weights.
            BitdistillError: what a teacher said when it could not load its model.
        """
        self._keep()
        while not self.complete:
            if self.refusal is not None:
                raise self.refusal
            await asyncio.sleep(0.05)
        assert self.identity is not None
        return self.identity, self.description

    async def offer(self) -> Offer:
        """What this pool serves, for the handshake with a job that joins; waits as `started` does."""
        identity, description = await self.started()
        return Offer(source=self.source, identity=identity, description=description, dtype=self.config.dtype)

    async def membership(self) -> Membership:
        """The teachers that take questions."""
        self._keep()
        return Membership(self.version, {n: m.handle for n, m in self._live().items()})

    async def report(self, report: Report) -> Membership:
        """Note what a client says; returns the membership, with the notes that its job has not heard."""
        known = self.clients.setdefault(report.client, _Client(report, 0.0))
        known.report, known.heard_at = report, time.monotonic()
        known.seconds += report.seconds
        known.waited_s += report.waited_s
        since = self.told.setdefault(report.job, len(self.notes))
        self.told[report.job] = len(self.notes)
        now = await self.membership()
        return Membership(now.version, now.teachers, tuple(self.notes[since:]))

    async def scale(self, teachers: int) -> None:
        """Want so many teachers from now on, within the bounds, until a decision changes it."""
        self._want(min(max(teachers, self.bounds.least), self.bounds.most), "as asked")

    async def status(self) -> PoolStatus:
        """Everything at a glance."""
        self._keep()
        heard = self._heard()
        return PoolStatus(
            source=self.source,
            identity=self.identity,
            bounds=(self.bounds.least, self.bounds.most),
            target=self.target,
            members=tuple(
                m.status(sum(c.report.outstanding.get(n, 0) for c in heard)) for n, m in self.members.items()
            ),
            clients=len(heard),
            notes=tuple(self.notes[-5:]),
        )

    async def close(self) -> None:
        """End all teachers, for good."""
        self.closed = True
        for task in self.tasks:
            task.cancel()
        for number in list(self.members):
            self._end(number)

    def _keep(self) -> None:
        """Start the loop: here, since a constructor has none, and since a restarted registry is only asked."""
        if not self.tasks and not self.closed:
            for _ in range(self.target):
                self._start()
            self._spawn(self._loop())

    def _spawn(self, work: Any) -> None:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _loop(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            due = time.monotonic() - self.window_began >= self.config.scale_every_s
            if due and all(client.seconds > 0 for client in self._heard()):
                self._observe()
            wanted = [m for m in self.members.values() if m.state is not State.DRAINING]
            for _ in range(self.target - len(wanted) if time.monotonic() >= self.retry_at else 0):
                self._start()
            for _ in range(len(wanted) - self.target):
                self._drain()
            for number, member in list(self.members.items()):
                if member.state is State.DRAINING and not member.ending and self._let_go_by_all(number, member):
                    member.ending = True
                    self._spawn(self._finish(number, member))

    def _observe(self) -> None:
        """Close a window, and decide where the pool is settled."""
        members = list(self.members.values())
        clients = self._heard()
        shares = [share for m in members if (share := m.take_idle_share()) is not None]
        seen = Observation(
            teachers=len(self._live()),
            wait_share=max((c.waited_s / c.seconds for c in clients), default=None),
            idle_share=sum(shares) / len(shares) if shares else None,
        )
        self.window_began = time.monotonic()
        for client in self.clients.values():
            client.seconds = client.waited_s = 0.0
        if any(m.state is not State.LIVE for m in members):
            self.history.clear()
            return
        self.history.append(seen)
        decision = decide(self.history, self.bounds)
        if decision is not None:
            self._want(decision.teachers, decision.reason)

    def _want(self, teachers: int, reason: str) -> None:
        if teachers != self.target:
            self._note(f"teacher pool: {self.target} -> {teachers} teachers: {reason}")
        self.target = teachers
        self.history.clear()

    def _start(self) -> None:
        config = self.config
        remote = ray.remote(TeacherActor).options(
            num_cpus=config.cpus, num_gpus=config.gpus, max_restarts=-1, max_task_retries=0
        )
        handle = remote.remote(self.source, dtype=config.dtype, threads=config.threads, storage=self.storage,
                               spread=config.gpus > 1)  # fmt: skip
        number, self.count = self.count, self.count + 1
        self.members[number] = Member(number, handle)
        self._spawn(self._tend(number, self.members[number]))

    async def _tend(self, number: int, member: Member) -> None:
        """One teacher from its start to its end."""
        try:
            found = await self._within(member.handle.handshake, self.config.timeout_s)
            member.description = await self._within(member.handle.describe, self.config.timeout_s)
            self.identity, self.description = self.identity or found, member.description
            refuse_change(self.identity, found)
        except TimeoutError:
            config = self.config
            self._refuse(number, TeacherError(
                "teacher", f"{config.actors} x ({config.cpus} CPUs, {config.gpus} GPUs) did not start in "
                f"{config.timeout_s:.0f} s", "Lower teacher.actors, cpus or gpus to what `ray status` shows, or raise "
                "teacher.timeout_s"))  # fmt: skip
            return
        except BitdistillError as error:
            self._refuse(number, error)
            return
        if member.state is State.STARTING:
            member.state = State.LIVE
            self.version += 1
            self.complete = self.complete or len(self._live()) >= self.config.actors
        died = 0
        while number in self.members:
            await asyncio.sleep(PROBE_S)
            try:
                member.measure(await member.handle.load.remote())
                died = 0
            except RayActorError as error:
                died = died + 1 if isinstance(error, ActorDiedError) else 0
                if died == DEAD_PROBES and number in self.members:
                    self._note(f"teacher pool: teacher {number} is dead: replaced")
                    self._end(number)
            except RayError as error:
                self._refuse(number, user_error(error) or TeacherError("teacher", str(error), "See its log"))

    async def _within(self, method: Any, timeout_s: float) -> Any:
        """What a method of an actor returns, asked again while Ray restarts the actor."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                return await asyncio.wait_for(_result(method.remote()), max(0.0, deadline - time.monotonic()))
            except RayActorError:
                await asyncio.sleep(PAUSE_S)
            except RayError as error:
                raise user_error(error) or TeacherError("teacher", str(error), "See its log") from None

    def _refuse(self, number: int, error: BitdistillError) -> None:
        """Give a teacher up.  A pool that had all its teachers once goes on with those it has, and may try again."""
        if number not in self.members:
            return
        self._end(number)
        self.retry_at = time.monotonic() + RETRY_S
        if not self.complete:
            self.refusal = self.refusal or error
            return
        self.target = max(len(self._live()), self.bounds.least)
        self.history.clear()
        self._note(f"teacher pool: one teacher given up, {len(self._live())} go on: {error}")

    def _drain(self) -> None:
        """Take the least busy teacher off the list, the youngest of several."""
        queue = {n: sum(c.report.outstanding.get(n, 0) for c in self._heard()) for n in self.members}
        going = [m for m in self.members.values() if m.state is not State.DRAINING]
        member = min(going, key=lambda m: (m.state is State.LIVE, queue[m.number], -m.number))
        self.version += 1
        member.state, member.left_at = State.DRAINING, self.version

    def _let_go_by_all(self, number: int, member: Member) -> bool:
        return all(
            c.report.version >= member.left_at and not c.report.outstanding.get(number, 0) for c in self._heard()
        )

    async def _finish(self, number: int, member: Member) -> None:
        """End a teacher after the questions that reached it, or after `timeout_s`."""
        with suppress(TimeoutError, RayError):  # silent or dead: there is nothing left to wait for
            await asyncio.wait_for(_result(member.handle.load.remote()), self.config.timeout_s)
        if number in self.members:
            self._end(number)

    def _end(self, number: int) -> None:
        member = self.members.pop(number)
        self.version += 1
        ray.kill(member.handle)

    def _live(self) -> Mapping[int, Member]:
        return {n: m for n, m in self.members.items() if m.state is State.LIVE}

    def _heard(self) -> list[_Client]:
        """Clients that are there; the others are forgotten."""
        oldest = time.monotonic() - SILENT_S
        self.clients = {name: c for name, c in self.clients.items() if c.heard_at >= oldest}
        return list(self.clients.values())

    def _note(self, line: str) -> None:
        print(line, flush=True)
        self.notes.append(line)


async def _result(reference: Awaitable[Any]) -> Any:
    return await reference
