"""A pool that changes while students use it: it grows when they wait, shrinks when teachers idle, and loses nothing."""

from __future__ import annotations

import os
import signal
from collections import deque

import pytest
import ray

from bitdistill_ray.core import Payload
from bitdistill_ray.teacher import wire
from bitdistill_ray.teacher.client import TeacherClient
from bitdistill_ray.teacher.member import State
from bitdistill_ray.teacher.pool import TeacherPool
from bitdistill_ray.teacher.request import SignalRequest
from tests.teacher.pools import batches, check_answers, client_of, pool_config, process_of, states, until
from tests.tiny_models import packed_batch, save_tiny

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(400)]

NEVER = 10_000.0


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("teacher"), "llama"))


def test_it_grows_while_students_wait_and_shrinks_when_teachers_idle(source: str) -> None:
    pool = TeacherPool.start(source, pool_config(1, max_actors=2, scale_every_s=1.0))
    said: list[str] = []
    try:
        hard = SignalRequest(payload=Payload.TOPK, topk=8)  # much to compute, little to send
        client = TeacherClient(pool.roster, hard, timeout_s=180, attempts=3, say=said.append)
        arrays = wire.encode_batch(packed_batch([[64]] * 128, 64, seed=0))
        tickets = deque(client.ask(arrays) for _ in range(4))

        def grown() -> bool:
            """One more answer, taken at once: this student does nothing but wait."""
            client.answer(tickets.popleft(), arrays)
            tickets.append(client.ask(arrays))
            return len(client.membership.teachers) == 2

        until(grown, "the pool grows", pause_s=0)
        tickets.extend(client.ask(arrays) for _ in range(4))
        assert {ticket.teacher for ticket in tickets} == {0, 1}
        for ticket in tickets:
            client.answer(ticket, arrays)
        assert client.take_counters()["retries"] == 0

        def shrunk() -> bool:
            client.follow()
            return len(client.membership.teachers) == 1

        until(shrunk, "the pool shrinks")
        assert any(line.startswith("teacher pool: 1 -> 2 teachers: students waited") for line in said), said
        assert any(line.startswith("teacher pool: 2 -> 1 teachers: teachers idled") for line in said), said
    finally:
        pool.shutdown()


def test_a_teacher_that_is_let_go_answers_first(source: str) -> None:
    """It stands still when the pool shrinks, with questions: it is kept until it has answered them."""
    pool = TeacherPool.start(source, pool_config(2, min_actors=1, scale_every_s=NEVER))
    try:
        client, asked = client_of(pool), batches(6)
        process = process_of(client.membership.teachers[1])
        os.kill(process, signal.SIGSTOP)
        tickets = [client.ask(wire.encode_batch(batch)) for batch in asked]
        assert [ticket.teacher for ticket in tickets].count(1) == 3
        pool.scale(1)
        until(lambda: states(pool)[1] is State.DRAINING or states(pool)[0] is State.DRAINING, "one is let go")
        going = next(n for n, state in states(pool).items() if state is State.DRAINING)

        def knows() -> bool:
            client.follow()
            return len(client.membership.teachers) == 1

        until(knows, "the client hears of it")
        late = client.ask(wire.encode_batch(asked[0]))
        assert late.teacher != going
        assert states(pool)[going] is State.DRAINING
        os.kill(process, signal.SIGCONT)
        check_answers(client, [*asked, asked[0]], [*tickets, late], source)
        assert client.take_counters()["retries"] == 0

        def gone() -> bool:
            client.follow()
            return going not in states(pool)

        until(gone, "the teacher goes")
        assert list(states(pool).values()) == [State.LIVE]
    finally:
        pool.shutdown()


def test_a_teacher_that_is_dead_for_good_is_replaced(source: str) -> None:
    pool = TeacherPool.start(source, pool_config(1, scale_every_s=NEVER))
    try:
        client, asked = client_of(pool), batches(3)
        tickets = [client.ask(wire.encode_batch(batch)) for batch in asked]
        ray.kill(client.membership.teachers[0])
        check_answers(client, asked, tickets, source)
        again = client.ask(wire.encode_batch(asked[0]))
        check_answers(client, asked[:1], [again], source)
        assert again.teacher == 1
        assert states(pool) == {1: State.LIVE}
    finally:
        pool.shutdown()


def test_a_registry_that_is_killed_brings_its_teachers_back(source: str) -> None:
    pool = TeacherPool.start(source, pool_config(2, scale_every_s=NEVER))
    try:
        client, asked = client_of(pool), batches(4)
        ray.kill(pool.roster.registry, no_restart=False)
        tickets = [client.ask(wire.encode_batch(batch)) for batch in asked]
        check_answers(client, asked, tickets, source)
        before = pool.roster.first.version

        def back() -> bool:
            now = pool.roster.now(60)
            return now is not None and now.version > before and len(now.teachers) == 2

        until(back, "both are back")
        check_answers(client, asked, [client.ask(wire.encode_batch(batch)) for batch in asked], source)
    finally:
        pool.shutdown()
