"""An inbox that gets no data says so, and gives up when it was told to."""

from __future__ import annotations

import time
from typing import Any

import pytest
import ray

from bitdistill_ray.errors import DataError
from bitdistill_ray.student import inbox
from bitdistill_ray.student.inbox import Inbox, Share
from bitdistill_ray.teacher.wire import encode_batch
from tests.tiny_models import packed_batch

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session")]

NEVER = 3600.0


class LateFeeder:
    """Hands a batch out after `seconds`."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def batch(self, step: int, **_: int) -> dict[str, Any]:
        time.sleep(self.seconds)
        return encode_batch(packed_batch([[5]], 8, seed=step))

    def sequences(self, step: int) -> dict[str, int]:
        return {"sequences": step + 1}


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(inbox, "SAY_EVERY_S", 0.2)
    return []


def read(seconds: float, said: list[str], timeout_s: float) -> list[Any]:
    feeder = ray.remote(LateFeeder).options(num_cpus=0).remote(seconds)
    share = Share(rank=0, ranks=1, micros=1)
    try:
        return list(Inbox(feeder, None, share, first=0, steps=2, in_flight=2, timeout_s=timeout_s, say=said.append))
    finally:
        ray.kill(feeder)


def test_it_waits_aloud(said: list[str]) -> None:
    steps = read(1.0, said, NEVER)
    assert [micros[0]["ids"].shape for micros in steps] == [(1, 8)] * 2
    assert any(line.startswith("waiting for data: no batch for ") and "CPUs are free" in line for line in said), said


def test_it_gives_up(said: list[str]) -> None:
    with pytest.raises(DataError, match=r"no batch for \d+ s, .* raise data\.timeout_s"):
        read(NEVER, said, 1.0)
