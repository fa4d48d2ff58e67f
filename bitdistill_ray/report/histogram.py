"""Histograms of latent weights before and after training, with the grid's levels and its cuts, as inline SVG."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bitdistill_ray.quant.report import NEAR_CUT
from bitdistill_ray.report.axis import Scale
from bitdistill_ray.report.markup import Markup, element

if TYPE_CHECKING:
    from bitdistill_ray.report.weights import Histogram

WIDTH, HEIGHT = 300.0, 150.0
SIDE, TOP, BOTTOM = 8.0, 16.0, 24.0
MOST_LABELS = 9


def weight_histogram(histogram: Histogram) -> Markup:
    """A small figure: an area for before, a line for after, a dashed upright for each level, a dotted one for each cut
    between two: where a ternary student that learns well gathers its weights (BitNet Distillation)."""
    top = max(max(histogram.before), max(histogram.after, default=0.0), 1e-12)
    x = Scale(-histogram.reach, histogram.reach, SIDE, WIDTH - SIDE)
    y = Scale(0.0, top, HEIGHT - BOTTOM, TOP)
    shown = histogram.levels if len(histogram.levels) <= MOST_LABELS else histogram.levels[::2]
    parts = [
        *(element("line", x1=x(v), x2=x(v), y1=TOP - 4, y2=HEIGHT - BOTTOM, class_="level") for v in histogram.levels),
        *(element("line", x1=x(v), x2=x(v), y1=TOP - 4, y2=HEIGHT - BOTTOM, class_="cut") for v in histogram.cuts),
        element("path", d=_outline(histogram.before, x, y, histogram.reach) + "Z", class_="before"),
        element("line", x1=SIDE, x2=WIDTH - SIDE, y1=y(0), y2=y(0), class_="axis"),
        *(element("text", f"{v:.2g}", x=x(v), y=HEIGHT - 8, text_anchor="middle", class_="tick") for v in shown),
    ]
    if histogram.after:
        outline = _outline(histogram.after, x, y, histogram.reach)
        parts.append(element("path", d=outline, fill="none", class_="curve series-0"))
    said = f"{histogram.kind}: {histogram.weights:,} weights in units of their scale; " + _shares(
        histogram, (0.0,), 0.25, "within a quarter of a unit of zero"
    )
    near = _shares(histogram, histogram.cuts, NEAR_CUT, f"within {NEAR_CUT:g} of a cut") if histogram.cuts else ""
    said += f"; {near}" if near else ""
    svg = element("svg", *parts, viewBox=f"0 0 {WIDTH:g} {HEIGHT:g}", role="img", aria_label=said)
    caption = element("figcaption", element("strong", histogram.kind), element("small", f" {near}") if near else None)
    return element("figure", caption, svg)


def _shares(histogram: Histogram, points: tuple[float, ...], distance: float, where: str) -> str:
    before, after = (histogram.near(points, distance, s) if s else None for s in (histogram.before, histogram.after))
    return f"{where} {100 * (before or 0):.1f} % before" + (f" and {100 * after:.1f} % after" if after else "")


def _outline(shares: Sequence[float], x: Scale, y: Scale, reach: float) -> str:
    """Stairs from the ground up and back to it."""
    width = 2 * reach / len(shares)
    stairs = [f"M{x(-reach):.1f} {y(0):.1f}"]
    for i, share in enumerate(shares):
        left, right = -reach + i * width, -reach + (i + 1) * width
        stairs.append(f"L{x(left):.1f} {y(share):.1f}L{x(right):.1f} {y(share):.1f}")
    return "".join([*stairs, f"L{x(reach):.1f} {y(0):.1f}"])
