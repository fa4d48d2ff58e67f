"""A rate shared by replicas is the rate of one bucket: on a loop whose time is a number, with the real ledger."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitdistill_serve.errors import ApiError, LedgerAwayError
from bitdistill_serve.keys import make_key
from bitdistill_serve.rates import Bucket
from bitdistill_serve.shares import LOAN_S, Drawn, Ledger, Rate, Share, What, client_of


class JumpingLoop(asyncio.SelectorEventLoop):
    """Never waits: where it would, its time jumps to the next timer."""

    def __init__(self) -> None:
        self.now_s = 0.0
        loop = self

        class Selector(selectors.SelectSelector):
            def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
                loop.now_s += timeout or 0.0
                return super().select(0)

        super().__init__(Selector())

    def time(self) -> float:
        return self.now_s


def run(scenario: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=JumpingLoop) as runner:
        runner.run(scenario)


def shared(per_minute: int, replicas: int) -> list[Share]:
    clock = asyncio.get_running_loop().time
    rate, ledger = Rate("key", What.TOKENS, per_minute), Ledger(clock)
    return [Share(rate, ledger, clock) for _ in range(replicas)]


@st.composite
def asked(draw: st.DrawFn) -> list[tuple[int, int, float]]:
    """(replica, units, seconds until then) of some requests."""
    pauses = st.sampled_from([0.0, 0.0, 0.0, 0.01, 0.3, 0.99, 1.0, 7.0])
    return draw(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 40), pauses), min_size=1, max_size=60))


@given(per_minute=st.sampled_from([1, 7, 60, 600, 6000]), requests=asked())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_no_window_gives_more_than_one_bucket_would(per_minute: int, requests: list[tuple[int, int, float]]) -> None:
    async def scenario() -> None:
        loop, taken = asyncio.get_running_loop(), list[tuple[float, int]]()
        shares = shared(per_minute, 4)
        for replica, units, pause_s in requests:
            await asyncio.sleep(pause_s)
            units = min(units, per_minute)
            if await shares[replica].take(units) == 0:
                taken.append((loop.time(), units))
        for begin, (began_s, _) in enumerate(taken):
            given = 0
            for at_s, units in taken[begin:]:
                given += units
                assert given <= per_minute * (1 + (at_s - began_s + LOAN_S) / 60) + 1e-6

    run(scenario())


@given(per_minute=st.sampled_from([7, 60, 600, 6000]), requests=asked())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_what_nobody_spent_is_there_for_whoever_asks_next(
    per_minute: int, requests: list[tuple[int, int, float]]
) -> None:
    """When loans have gone back, a share gives what one bucket of the same history holds, and tells the same wait."""

    async def scenario() -> None:
        clock = asyncio.get_running_loop().time
        shares, one = shared(per_minute, 4), Bucket(per_minute, clock)
        for replica, units, pause_s in requests:
            await asyncio.sleep(pause_s + 1.01 * LOAN_S)  # by then every loan has gone back
            wait_s = one.wait_s(units)
            assert await shares[replica].take(units) == pytest.approx(wait_s, abs=1e-6)
            if not wait_s:
                one.take(units)
            shares[replica].charge(5)  # of an answer
            one.take(5)
            await shares[replica].settled()

    run(scenario())


def test_a_busy_key_asks_the_ledger_once_for_many_requests() -> None:
    class Counted(Ledger):
        draws = 0

        async def draw(self, rate: Rate, units: int, most: int) -> Drawn:
            self.draws += 1
            return await super().draw(rate, units, most)

    async def scenario() -> None:
        clock = asyncio.get_running_loop().time
        ledger = Counted(clock)
        share = Share(Rate("key", What.REQUESTS, 6000), ledger, clock)  # 100 a second
        assert [await share.take(1) for _ in range(101)] == [0.0] * 101
        assert ledger.draws == 1

    run(scenario())


def test_an_answer_leaves_a_debt_that_every_replica_knows() -> None:
    async def scenario() -> None:
        first, second = shared(60, 2)
        assert await first.take(10) == 0
        first.charge(110)
        await first.settled()
        assert await second.take(1) == pytest.approx(61, abs=0.1)  # 60 owed, and the one
        await asyncio.sleep(62)
        assert await second.take(1) == 0

    run(scenario())


def test_without_a_ledger_a_share_counts_for_itself() -> None:
    class Away(Ledger):
        async def draw(self, rate: Rate, units: int, most: int) -> Drawn:
            raise LedgerAwayError("the ledger", "is away", "Wait")

        async def charge(self, rate: Rate, units: int) -> None:
            raise LedgerAwayError("the ledger", "is away", "Wait")

    async def scenario() -> None:
        _, key = make_key("me", requests_per_minute=2, tokens_per_minute=10)
        client = client_of(key, Away())
        await client.ask()
        await client.ask()
        with pytest.raises(ApiError, match="requests of the minute") as refused:
            await client.ask()
        assert (refused.value.status, refused.value.retry_after_s) == (429, 30)
        client.charge(20)
        await asyncio.sleep(0)
        with pytest.raises(ApiError, match="tokens of the minute"):
            await client.spend(1)

    asyncio.run(scenario())
