"""Numbers for people: round tick marks, figures of four digits, and curves thinned to what a screen can show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Point = tuple[float, float]
STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round values whose ends enclose [low, high]."""
    if not high > low:
        pad = abs(low) * 0.05 or 1.0
        low, high = low - pad, high + pad
    raw = (high - low) / max(1, count - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * s for s in STEPS if power * s >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def figure(value: float | None) -> str:
    """Four digits: 1.234, 12,346, 0.0001234 as 1.234e-4; a dash for what was not measured."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}" if size < 1e9 else f"{value:.3e}"
    if size == 0 or size >= 1e-3:
        return f"{value:.4g}"
    digits, _, exponent = f"{value:.3e}".partition("e")
    return f"{digits}e{int(exponent)}"


def tick_labels(values: Sequence[float]) -> list[str]:
    """Tick marks with as many decimals as their distance needs, all alike."""
    step = abs(values[1] - values[0]) if len(values) > 1 else 1.0
    largest = max(abs(v) for v in values)
    if largest >= 1e6 or (0 < largest < 1e-2):
        return [f"{v if abs(v) > step / 2 else 0:.4g}".replace("e-0", "e-").replace("e+0", "e") for v in values]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    if abs(step * 10**decimals - round(step * 10**decimals)) > 1e-6:
        decimals += 1  # steps of 2.5
    return [f"{v if abs(v) > step / 2 else 0:,.{decimals}f}" for v in values]


def thin(points: Sequence[Point], most: int) -> list[Point]:
    """At most `most` points: means over runs of neighbours of equal number; the last point is kept as it is."""
    if len(points) <= most:
        return list(points)
    size = math.ceil((len(points) - 1) / (most - 1))
    runs = [points[i : i + size] for i in range(0, len(points) - 1, size)]
    means = [(run[-1][0], sum(y for _, y in run) / len(run)) for run in runs]
    return [*[m for m in means if m[0] < points[-1][0]], points[-1]]


def smooth(points: Sequence[Point], half_life: float) -> list[Point]:
    """An exponential mean whose memory halves every `half_life` points, without the usual bias at the start."""
    keep, total, weight = 0.5 ** (1 / half_life), 0.0, 0.0
    smoothed = []
    for x, y in points:
        total, weight = keep * total + (1 - keep) * y, keep * weight + (1 - keep)
        smoothed.append((x, total / weight))
    return smoothed


@dataclass(frozen=True, slots=True)
class Scale:
    """A linear map from values to pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)
