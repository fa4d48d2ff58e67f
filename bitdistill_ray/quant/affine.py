"""int2, int3 and int4: asymmetric integers with an integer zero point (BitDistiller; Q = 2^bits - 1).

    scale = max(M - m, 1e-5) / Q        zero = clip(-round_half_even(m / scale), 0, Q)
    index = clip(round(w / scale) + zero, 0, Q) - zero        w^ = index * scale

M and m are the largest and smallest weight of the group, zero included (see `extremes`).  Neither is detached: the
scale is a function of the weights, the zero point is a constant, rounding is the identity, and a clipped weight passes
no gradient, so that

    dL/dw_i = g_i [i inside] + ([i = argmax] - [i = argmin]) / Q * sum_j g_j (index_j - [j inside] w_j / scale)

Detaching the scale would be another method.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitdistill_ray.core import Format, QuantSpec, Rounding, ScaleDtype
from bitdistill_ray.quant.extremes import extremes, route_, with_extremes_of
from bitdistill_ray.quant.quantizer import Quantizer, register
from bitdistill_ray.quant.rounding import MIN_SCALE, round_, round_scale


class Affine(Quantizer):
    """Codes 0 .. 2^bits - 1 stand for (code - zero) times the scale."""

    def __init__(self, bits: int) -> None:
        self.largest: int = 2**bits - 1

    def raw_scale(self, w_RGS: Tensor) -> Tensor:
        return self._range_scale(*extremes(w_RGS))

    def scale_and_zero(self, w_RGS: Tensor, dtype: ScaleDtype) -> tuple[Tensor, Tensor | None]:
        bottom_RG1, top_RG1 = extremes(w_RGS)
        scale_RG1 = round_scale(self._range_scale(bottom_RG1, top_RG1), dtype)
        zero_RG1 = torch.clamp(0.0 - torch.round(bottom_RG1 / scale_RG1), 0.0, self.largest)  # never -0.0
        return scale_RG1, zero_RG1

    def encode(self, w_RGS: Tensor, scale_RGC: Tensor, zero_RG1: Tensor | None, rounding: Rounding) -> Tensor:
        low_RG1, high_RG1 = self._bounds(zero_RG1)
        return round_(w_RGS / scale_RGC, rounding).clamp_(low_RG1, high_RG1)

    def code_offset(self, zero_RG1: Tensor | None) -> Tensor:
        assert zero_RG1 is not None
        return zero_RG1

    def decode(self, index_RGS: Tensor, scale_RGC: Tensor) -> Tensor:
        return index_RGS.mul_(scale_RGC)

    def gradient(
        self, grad_RGS: Tensor, w_RGS: Tensor, scale_RGC: Tensor, zero_RG1: Tensor | None, rounding: Rounding
    ) -> tuple[Tensor, Tensor | None]:
        ratio_RGS = w_RGS / scale_RGC
        index_RGS = round_(ratio_RGS.clone(), rounding)
        low_RG1, high_RG1 = self._bounds(zero_RG1)
        inside_RGS = ((index_RGS >= low_RG1) & (index_RGS <= high_RG1)).to(w_RGS.dtype)
        slope_RGS = index_RGS.clamp_(low_RG1, high_RG1).sub_(ratio_RGS.mul_(inside_RGS))
        bottom_RG1, top_RG1 = extremes(w_RGS)
        to_RG1 = slope_RGS.mul_(grad_RGS).sum(dim=-1, keepdim=True) / self.largest
        to_RG1 = to_RG1 * (top_RG1 - bottom_RG1 >= MIN_SCALE)
        grad_w_RGS = route_(grad_RGS * inside_RGS, to_RG1, w_RGS, top_RG1)
        return route_(grad_w_RGS, -to_RG1, w_RGS, bottom_RG1), None

    def hold(self, w_RGS: Tensor, like_RGS: Tensor, spec: QuantSpec) -> Tensor:
        return with_extremes_of(w_RGS, like_RGS)

    def _range_scale(self, bottom_RG1: Tensor, top_RG1: Tensor) -> Tensor:
        return (top_RG1 - bottom_RG1).clamp(min=MIN_SCALE) / self.largest

    def _bounds(self, zero_RG1: Tensor | None) -> tuple[Tensor, Tensor]:
        """Lowest and highest index."""
        assert zero_RG1 is not None
        low_RG1 = zero_RG1.neg().add(0.0)  # never -0.0
        return low_RG1, low_RG1.add(self.largest)


register(Format.INT2, Affine(bits=2))
register(Format.INT3, Affine(bits=3))
register(Format.INT4, Affine(bits=4))
