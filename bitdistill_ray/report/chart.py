"""A line chart as inline SVG: each series as measured, thin, and smoothed, thick.

Colours come from the page's style (`series-0`, …), so that light and dark both fit.  A pointer over the chart shows the
figures at that step through SVG's own `<title>`; people who cannot see it hear the summary in `aria-label`, and the
table of rows says the same in numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bitdistill_ray.report.axis import Point, Scale, figure, smooth, thin, tick_labels, ticks
from bitdistill_ray.report.markup import Markup, element

WIDTH, HEIGHT = 520.0, 230.0
LEFT, RIGHT, TOP, BOTTOM = 58.0, 12.0, 12.0, 30.0
POINTS, BANDS = 400, 120
COLOURS = 6  # in style.css
SMOOTH_FROM = 40  # points; a shorter curve is drawn as it is


@dataclass(frozen=True, slots=True)
class Series:
    """One curve: (step, or whatever the axis counts, and value), in order."""

    name: str
    points: tuple[Point, ...]


def line_chart(
    title: str, series: Sequence[Series], *, note: str = "", from_zero: bool = False, over: str = "step"
) -> Markup:
    """A figure with its caption; series without finite points are left out, and a chart without series says so.

    `over` names what the horizontal axis counts.
    """
    drawn = [s for s in map(_finite, series) if s.points]
    heading = element("figcaption", element("strong", title), element("span", note, class_="note") if note else None)
    if not drawn:
        return element("figure", heading, element("p", "nothing was measured", class_="note"))
    xs = [x for s in drawn for x, _ in s.points]
    ys = [y for s in drawn for y in _shown_range(s.points)]
    y_ticks = ticks(min([0.0, *ys]) if from_zero else min(ys), max(ys), 5)
    x_ticks = [t for t in ticks(min(xs), max(xs), 6) if min(xs) <= t <= max(xs) and t == int(t)]
    x = Scale(min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1, LEFT, WIDTH - RIGHT)
    y = Scale(y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, TOP)
    parts = [
        *_grid(y, y_ticks),
        *(element("text", f"{t:,.0f}", x=x(t), y=HEIGHT - 10, text_anchor="middle", class_="tick") for t in x_ticks),
        *(curve for i, s in enumerate(drawn) for curve in _curves(s, i, x, y)),
        *_bands(drawn, x, over),
    ]
    said = "; ".join(_summary(s) for s in drawn)
    svg = element(
        "svg", *parts, viewBox=f"0 0 {WIDTH:g} {HEIGHT:g}", role="img", aria_label=f"{title} by {over}. {said}"
    )
    return element("figure", heading, _legend(drawn), svg)


def _finite(series: Series) -> Series:
    return Series(series.name, tuple(p for p in series.points if math.isfinite(p[1])))


def _shown_range(points: Sequence[Point]) -> tuple[float, float]:
    """What the vertical axis covers: all thinned values."""
    values = [y for _, y in thin(points, POINTS)]
    return min(values), max(values)


def _grid(y: Scale, values: Sequence[float]) -> list[Markup]:
    marks = []
    for value, label in zip(values, tick_labels(values), strict=True):
        marks.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y(value), y2=y(value), class_="grid"))
        marks.append(element("text", label, x=LEFT - 8, y=y(value) + 4, text_anchor="end", class_="tick"))
    return marks


def _curves(series: Series, index: int, x: Scale, y: Scale) -> list[Markup]:
    points = thin(series.points, POINTS)
    if len(points) == 1:
        [(step, value)] = points
        return [element("circle", cx=x(step), cy=y(value), r=3, class_=f"dot {colour(index)}")]
    raw = element("path", d=path(points, x, y), fill="none", class_=f"curve {colour(index)}")
    if len(points) < SMOOTH_FROM:
        return [raw]
    faint = element("path", d=path(points, x, y), fill="none", class_=f"curve faint {colour(index)}")
    smoothed = smooth(points, len(points) / 40)
    return [faint, element("path", d=path(smoothed, x, y), fill="none", class_=f"curve {colour(index)}")]


def colour(index: int) -> str:
    """The style's classes for the curve of this number: six colours, and the same ones dashed for those after them."""
    return f"series-{index % COLOURS}" + (" dashed" if index >= COLOURS else "")


def path(points: Sequence[Point], x: Scale, y: Scale) -> str:
    """SVG's path through the points."""
    return "M" + "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in points)


def _bands(drawn: Sequence[Series], x: Scale, over: str) -> list[Markup]:
    """Upright strips that say their figures when the pointer is over them."""
    thinned = [dict(thin(s.points, BANDS)) for s in drawn]
    steps = sorted({step for points in thinned for step in points})
    strips = []
    for i, step in enumerate(steps):
        start = x((steps[i - 1] + step) / 2) if i else LEFT
        end = x((steps[i + 1] + step) / 2) if i + 1 < len(steps) else WIDTH - RIGHT
        said = ", ".join(f"{s.name} {figure(v[step])}" for s, v in zip(drawn, thinned, strict=True) if step in v)
        title = element("title", f"{over} {step:,.0f}: {said}")
        strips.append(
            element(
                "rect",
                title,
                x=start,
                y=TOP,
                width=max(0.1, end - start),
                height=HEIGHT - BOTTOM - TOP,
                fill_opacity=0,
                class_="band",
            )
        )
    return strips


def _legend(drawn: Sequence[Series]) -> Markup:
    items = [
        element("span", element("i", class_=f"swatch {colour(i)}"), f"{s.name} ", element("b", figure(s.points[-1][1])))
        for i, s in enumerate(drawn)
    ]
    return element("p", *items, class_="legend")


def _summary(series: Series) -> str:
    values = [y for _, y in series.points]
    return (
        f"{series.name}: from {figure(values[0])} to {figure(values[-1])}, "
        f"least {figure(min(values))}, most {figure(max(values))}"
    )
