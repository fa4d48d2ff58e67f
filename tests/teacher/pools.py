"""What the tests of pools share: configurations, questions, and answers compared with the model in this process."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
import torch

from bitdistill_ray.config import Dtype, TeacherConfig
from bitdistill_ray.core import TokenBatch
from bitdistill_ray.teacher import wire
from bitdistill_ray.teacher.actor import Teacher
from bitdistill_ray.teacher.client import TeacherClient
from bitdistill_ray.teacher.member import State
from bitdistill_ray.teacher.pool import TeacherPool
from bitdistill_ray.teacher.request import SignalRequest
from tests.tiny_models import packed_batch


def pool_config(actors: int = 1, **fields: Any) -> TeacherConfig:
    return TeacherConfig(actors=actors, **{"cpus": 0.5, "threads": 1, "dtype": Dtype.FP32, "timeout_s": 240, **fields})


def client_of(pool: TeacherPool, *, timeout_s: float = 180, attempts: int = 3, **more: Any) -> TeacherClient:
    return TeacherClient(pool.roster, SignalRequest(), timeout_s=timeout_s, attempts=attempts, **more)


def batches(count: int) -> list[TokenBatch]:
    return [packed_batch([[7, 6], [12]], 16, seed=seed) for seed in range(count)]


def check_answers(client: TeacherClient, asked: Sequence[TokenBatch], tickets: Sequence[Any], source: str) -> None:
    """All answers, in the order of the questions, are what the model says in this process."""
    here = Teacher(source, dtype=Dtype.FP32, threads=1)
    for batch, ticket in zip(asked, tickets, strict=True):
        said = client.answer(ticket, wire.encode_batch(batch))
        expected = here.signals(batch, SignalRequest()).hidden_BTD
        assert said.hidden_BTD is not None
        assert expected is not None
        torch.testing.assert_close(said.hidden_BTD, expected, rtol=1e-5, atol=1e-6)


def process_of(handle: Any) -> int:
    """The process id of an actor, once it answers (again)."""
    while True:
        try:
            return int(ray.get(handle.__ray_call__.remote(lambda _: os.getpid()), timeout=60))
        except ray.exceptions.RayActorError:
            time.sleep(0.1)


def until(condition: Callable[[], bool], what: str, timeout_s: float = 200, pause_s: float = 0.1) -> None:
    """Ask for `condition` every `pause_s`, and fail where it does not come."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not in {timeout_s:.0f} s: {what}"
        time.sleep(pause_s)


def states(pool: TeacherPool) -> dict[int, State]:
    """Where each teacher of the pool stands."""
    return {member.number: member.state for member in pool.status().members}
