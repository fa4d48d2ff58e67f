"""Texts that teachers write: all of them, the same ones whoever dies meanwhile."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import ray

from bitdistill_ray.config import Dtype, TeacherConfig
from bitdistill_ray.errors import TeacherError
from bitdistill_ray.stage_config import WriteStage
from bitdistill_ray.stages.write import Part, _written, is_held_out, repeated_share
from bitdistill_ray.teacher.actor import Written
from bitdistill_ray.teacher.pool import TeacherPool
from tests.teacher.pools import process_of
from tests.tiny_models import save_tiny

OPTIONS = WriteStage(texts=10, max_new_tokens=12, batch=2, temperature=1.0, seed=3)
PROMPTS = ["The fox", "Numbers", "Le café"]
SIZE = 4
PARTS: list[Part] = [(0, 0), (1, 4), (2, 8)]


@pytest.fixture(params=[pytest.param(1, marks=pytest.mark.soak), 2])
def pool(request: pytest.FixtureRequest, ray_session: None, tmp_path: Path) -> Iterator[TeacherPool]:
    config = TeacherConfig(actors=request.param, cpus=0.5, threads=1, dtype=Dtype.FP32, timeout_s=120, attempts=3)
    started = TeacherPool.start(str(save_tiny(tmp_path / "teacher", "llama")), config)
    yield started
    started.shutdown()


def written(pool: TeacherPool) -> dict[Part, list[Written]]:
    return dict(_written(pool, deque(PARTS), PROMPTS, OPTIONS, SIZE))


@pytest.mark.slow
def test_a_teacher_that_is_killed_costs_no_text(pool: TeacherPool, capfd: pytest.CaptureFixture[str]) -> None:
    expected = written(pool)
    assert {part: len(texts) for part, texts in expected.items()} == {(0, 0): 4, (1, 4): 4, (2, 8): 2}
    for handle in pool.handles:
        ray.kill(handle, no_restart=False)
    assert written(pool) == expected
    assert capfd.readouterr().out.count("a teacher was lost while writing part") <= len(PARTS)


@pytest.mark.slow
def test_a_part_that_kills_its_teachers_is_given_up(pool: TeacherPool) -> None:
    once = replace(pool, config=pool.config.model_copy(update={"attempts": 1}))
    processes = [process_of(handle) for handle in pool.handles]
    for process in processes:
        os.kill(process, signal.SIGSTOP)  # so that none has written before it dies
    kills = [threading.Timer(2.0, os.kill, (process, signal.SIGKILL)) for process in processes]
    for kill in kills:
        kill.start()
    with pytest.raises(TeacherError, match=r"teacher: lost while writing part \d, in attempt 1 of 1\."):
        written(once)


@pytest.mark.slow
def test_teachers_that_do_not_come_back_are_given_up(pool: TeacherPool) -> None:
    impatient = replace(pool, config=pool.config.model_copy(update={"timeout_s": 2.0}))
    for handle in pool.handles:
        ray.kill(handle)
    with pytest.raises(TeacherError, match=r"teacher: all were lost, and none came back in 2 s\."):
        written(impatient)


@pytest.mark.parametrize(
    ("ids", "share"),
    [
        (range(50), 0.0),
        ([7] * 8, 0.0),  # a single 8-gram repeats nothing
        ([7] * 17, 9 / 10),
        ([*range(8), *range(8)], 1 / 9),
    ],
)
def test_repetition_is_the_share_of_8_grams_seen_before(ids: range | list[int], share: float) -> None:
    assert repeated_share(list(ids)) == pytest.approx(share)


def test_what_is_held_out_depends_on_the_number_alone_and_grows_with_the_share() -> None:
    few = {n for n in range(4000) if is_held_out(n, 0.05)}
    more = {n for n in range(4000) if is_held_out(n, 0.2)}
    assert few < more
    assert len(few) == pytest.approx(200, abs=60)
    assert len(more) == pytest.approx(800, abs=110)
    assert not any(is_held_out(n, 0.0) for n in range(100))
