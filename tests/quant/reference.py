"""The methods again, one weight at a time in plain Python floats, from the papers' formulas: what the tests compare to.

Each function takes the weights of one group (lists, float64), and gives the values and the closed-form gradients for an
output gradient g.  Nothing here is shared with the library.
"""

import math
from dataclasses import dataclass

from bitdistill_ray.core import Rounding

NF3_LEVELS = (-1, -0.535022735595703, -0.246931403875351, 0,
              0.183337524533272, 0.3819939494132996, 0.6229856610298157, 1)  # fmt: skip
NF3_POSITIVE_CUTS = (0.0916687622666359, 0.2826657369732857, 0.5024898052215576, 0.8114928305149078)
NF3_NEGATIVE_CUTS = (-0.1234657019376755, -0.39097706973552704, -0.7675113677978516)


@dataclass
class Reference:
    codes: list[int]
    values: list[float]
    grad_w: list[float]
    grad_alpha: float = 0.0


def nearest(x: float, rounding: Rounding) -> int:
    if rounding is Rounding.HALF_EVEN:
        return round(x)
    return int(math.copysign(math.floor(abs(x) + 0.5), x))


def ternary(w: list[float], g: list[float], rounding: Rounding) -> Reference:
    delta = max(sum(abs(x) for x in w) / len(w), 1e-5)
    q = [min(max(nearest(x / delta, rounding), -1), 1) for x in w]
    return Reference([x + 1 for x in q], [x * delta for x in q], list(g))


def affine(w: list[float], g: list[float], rounding: Rounding, bits: int) -> Reference:
    """BitDistiller 1a and 1c, for weights without ties at the extremes and with both signs."""
    top = 2**bits - 1
    s = max(max(w) - min(w), 1e-5) / top
    z = min(max(-round(min(w) / s), 0), top)
    free = [nearest(x / s, rounding) + z for x in w]
    codes = [min(max(x, 0), top) for x in free]
    inside = [float(0 <= x <= top) for x in free]
    grad = [gi * ins for gi, ins in zip(g, inside, strict=True)]
    if max(w) - min(w) >= 1e-5:
        ds = sum(gj * ((c - z) - ins * x / s) for gj, c, ins, x in zip(g, codes, inside, w, strict=True))
        grad[w.index(max(w))] += ds / top
        grad[w.index(min(w))] -= ds / top
    return Reference(codes, [(c - z) * s for c in codes], grad)


def symmetric(w: list[float], g: list[float], rounding: Rounding, bits: int) -> Reference:
    """For weights without ties of the largest magnitude."""
    top = 2 ** (bits - 1) - 1
    largest = max(w, key=abs)
    s = max(abs(largest), 1e-5) / top
    levels = [min(max(nearest(x / s, rounding), -top), top) for x in w]
    grad = list(g)
    if abs(largest) >= 1e-5:
        ds = sum(gj * (level - x / s) for gj, level, x in zip(g, levels, w, strict=True))
        grad[w.index(largest)] += ds / top * math.copysign(1, largest)
    return Reference([level + top + 1 for level in levels], [level * s for level in levels], grad)


def nf3(w: list[float], g: list[float]) -> Reference:
    """BitDistiller 1b and 1c, for weights without ties at the extremes and with both signs."""
    positive, negative = max(w), -min(w)
    codes, values, grad = [], [], list(g)
    for x, gi in zip(w, g, strict=True):
        s = positive if x >= 0 else negative
        u = x / s
        if x >= 0:
            code = 3 + sum(u >= cut for cut in NF3_POSITIVE_CUTS)
        else:
            code = 3 - sum(u < cut for cut in NF3_NEGATIVE_CUTS)
        codes.append(code)
        values.append(NF3_LEVELS[code] * s)
        if x >= 0:
            grad[w.index(max(w))] += gi * (NF3_LEVELS[code] - u)
        else:
            grad[w.index(min(w))] -= gi * (NF3_LEVELS[code] - u)
    return Reference(codes, values, grad)


def seq(w: list[float], g: list[float], rounding: Rounding, alpha: float, weights: int, n: float, c: float,
        first: int) -> Reference:  # fmt: skip
    """ParetoQ's stretched elastic quantiser; `first` is the integer of code 0, `weights` those of the matrix."""
    reference = Reference([], [], [])
    for x, gi in zip(w, g, strict=True):
        clipped = min(max(x / alpha, -0.99), 0.99)
        integer = nearest(clipped * n - c, rounding)
        level = (integer + c) / n
        inside = abs(x / alpha) <= 0.99
        reference.codes.append(integer - first)
        reference.values.append(level * alpha)
        reference.grad_w.append(gi if inside else 0.0)
        reference.grad_alpha += gi * (level - x / alpha if inside else level) / math.sqrt(weights * 1)
    return reference


def lsq3(w: list[float], g: list[float], rounding: Rounding, alpha: float, weights: int) -> Reference:
    reference = Reference([], [], [])
    for x, gi in zip(w, g, strict=True):
        level = min(max(nearest(x / alpha, rounding), -4), 3)
        inside = -4 <= x / alpha <= 3
        reference.codes.append(level + 4)
        reference.values.append(level * alpha)
        reference.grad_w.append(gi if inside else 0.0)
        reference.grad_alpha += gi * (level - x / alpha if inside else level) / math.sqrt(weights * 3)
    return reference


def lsq_affine(w: list[float], g: list[float], rounding: Rounding, alpha: float, weights: int, bits: int) -> Reference:
    """LSQ with levels -(2^(bits-1) - 1) .. 2^(bits-1) of a signed alpha; codes and zero point are those of |alpha|."""
    reference, top = Reference([], [], []), 2 ** (bits - 1)
    for x, gi in zip(w, g, strict=True):
        level = min(max(nearest(x / alpha, rounding), 1 - top), top)
        inside = 1 - top <= x / alpha <= top
        reference.codes.append(level + top - 1 if alpha > 0 else top - level)
        reference.values.append(level * alpha)
        reference.grad_w.append(gi if inside else 0.0)
        reference.grad_alpha += gi * (level - x / alpha if inside else level) / math.sqrt(weights * (top - 1))
    return reference
