"""Tick marks, figures and thinned curves."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitdistill_ray.report.axis import figure, smooth, thin, tick_labels, ticks

VALUES = st.floats(-1e9, 1e9, allow_subnormal=False).filter(lambda v: v == 0 or abs(v) > 1e-9)


@given(a=VALUES, b=VALUES)
def test_ticks_enclose_the_values_and_have_labels_of_their_own(a: float, b: float) -> None:
    low, high = min(a, b), max(a, b)
    if high - low < 1e-6 * max(abs(low), abs(high)):
        low = high
    found = ticks(low, high)
    slack = 1e-6 * (found[-1] - found[0])
    assert found[0] <= low + slack
    assert found[-1] >= high - slack
    assert 2 <= len(found) <= 8
    assert all(y > x for x, y in pairwise(found))


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0.21, 0.83, ["0.2", "0.4", "0.6", "0.8", "1.0"]),
        (0, 3e-4, ["0", "0.0001", "0.0002", "0.0003"]),
        (0, 3e-5, ["0", "1e-5", "2e-5", "3e-5"]),
        (0, 12_345, ["0", "5,000", "10,000", "15,000"]),
        (-1, 9, ["-2.5", "0.0", "2.5", "5.0", "7.5", "10.0"]),
    ],
)
def test_labels_have_the_decimals_that_their_distance_needs(low: float, high: float, labels: list[str]) -> None:
    assert tick_labels(ticks(low, high)) == labels


def test_figures_have_four_digits() -> None:
    values = (1.23456, 12345.6, 0.000123456, 0.0, None, math.nan, -0.5)
    assert [*map(figure, values)] == ["1.235", "12,346", "1.235e-4", "0", "–", "nan", "-0.5"]


def test_thinning_keeps_means_and_the_last_point() -> None:
    points = [(float(i), float(i % 2)) for i in range(1001)]
    thinned = thin(points, 100)
    assert len(thinned) <= 100
    assert thinned[-1] == points[-1]
    assert all(0.4 < y < 0.6 for _, y in thinned[:-1])
    assert [x for x, _ in thinned] == sorted({x for x, _ in thinned})
    assert thin(points[:5], 100) == points[:5]


def test_smoothing_has_no_bias_at_the_start_and_keeps_constants() -> None:
    assert smooth([(0, 5.0), (1, 5.0), (2, 5.0)], 10) == [(0, 5.0), (1, 5.0), (2, 5.0)]
    assert smooth([(0, 4.0), (1, 0.0)], 1)[1][1] == pytest.approx(4 * 0.25 / 0.75)
