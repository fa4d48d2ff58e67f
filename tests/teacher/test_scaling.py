"""The decision to grow or shrink is a pure function: what it wants, when it waits, and that it never swings."""

from __future__ import annotations

import pytest

from bitdistill_ray.config import TeacherConfig
from bitdistill_ray.errors import ConfigError
from bitdistill_ray.teacher.scaling import BUSY_ENOUGH, PATIENCE, Bounds, Observation, decide

BOUNDS = Bounds(1, 8)


def seen(teachers: int, wait: float | None, idle: float | None) -> Observation:
    return Observation(teachers=teachers, wait_share=wait, idle_share=idle)


@pytest.mark.parametrize(
    ("teachers", "wait", "idle", "wanted"),
    [
        (2, 0.50, 0.0, 4),  # twice the answers could be taken: twice the teachers
        (2, 0.20, 0.1, 3),
        (2, 0.95, 0.0, 4),  # at most twice as many at a time
        (6, 0.50, 0.0, 8),  # never beyond the bound
        (8, 0.90, 0.0, None),
        (2, 0.05, 0.0, None),  # a wait that costs less than the threshold
        (2, 0.60, 0.7, None),  # waiting while teachers idle: more of them would not help
        (4, 0.00, 0.6, 3),  # 1.6 teachers' work: three are half busy
        (4, 0.00, 0.2, None),  # 3.2 teachers' work: three could not do it
        (4, 0.05, 0.9, None),  # students wait a little: nobody goes
        (1, 0.00, 1.0, None),
        (3, None, 1.0, 2),  # nobody is there
        (3, None, None, None),
        (3, 0.4, None, 5),
    ],
)
def test_what_a_steady_state_leads_to(
    teachers: int, wait: float | None, idle: float | None, wanted: int | None
) -> None:
    decision = decide([seen(teachers, wait, idle)] * PATIENCE, BOUNDS)
    assert (decision.teachers if decision else None) == wanted


def test_a_change_has_its_reason_in_words() -> None:
    grown = decide([seen(2, 0.5, 0.04)] * 2, BOUNDS)
    assert grown is not None
    assert grown.reason == "students waited 50% of their time or more, teachers idled 4%"
    shrunk = decide([seen(4, 0.01, 0.625)] * 2, BOUNDS)
    assert shrunk is not None
    assert shrunk.reason == "teachers idled 62% of their time, students waited 1%"


def test_one_window_is_not_enough() -> None:
    assert decide([], BOUNDS) is None
    assert decide([seen(2, 0.5, 0.0)], BOUNDS) is None
    assert decide([seen(2, 0.0, 0.1), seen(2, 0.5, 0.0)], BOUNDS) is None
    assert decide([seen(2, 0.5, 0.0), seen(2, 0.0, 0.1)], BOUNDS) is None


def test_a_pool_outside_its_bounds_comes_back_at_once() -> None:
    low = decide([seen(1, 0.0, 1.0)], Bounds(2, 4))
    high = decide([seen(6, 0.9, 0.0)], Bounds(2, 4))
    assert low is not None
    assert high is not None
    assert (low.teachers, high.teachers) == (2, 4)


@pytest.mark.parametrize("work", [0.3, 0.9, 1.5, 2.2, 3.4, 5.1, 7.9, 20.0])
@pytest.mark.parametrize("start", [1, 3, 8])
def test_under_constant_work_the_pool_comes_to_rest(work: float, start: int) -> None:
    """`work` teachers' worth of questions: fewer make students wait, more idle; no size is left and taken again."""
    teachers, sizes = start, [start]
    for _ in range(30):
        wait = max(0.0, 1 - teachers / work)
        idle = max(0.0, 1 - work / teachers)
        decision = decide([seen(teachers, wait, idle)] * PATIENCE, BOUNDS)
        if decision is None:
            break
        teachers = decision.teachers
        sizes.append(teachers)
    assert decision is None
    assert len(set(sizes)) == len(sizes), sizes
    assert teachers == BOUNDS.most or max(0.0, 1 - teachers / work) <= 0.1
    assert teachers == BOUNDS.least or work / (teachers - 1) > BUSY_ENOUGH


@pytest.mark.parametrize("limits", [{"min_actors": 3}, {"max_actors": 1}, {"min_actors": 1, "max_actors": 1}])
def test_a_start_outside_the_bounds_is_refused(limits: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"teacher\.actors: 2 is not between min_actors \d and max_actors \d"):
        TeacherConfig(actors=2, **limits)


def test_a_pool_is_fixed_unless_told_otherwise() -> None:
    config = TeacherConfig(actors=3)
    assert (config.least, config.most) == (3, 3)
    assert (TeacherConfig(actors=3, max_actors=5).least, TeacherConfig(actors=3, max_actors=5).most) == (3, 5)
