"""seq2, seq-ternary, lsq3, int2-lsq and int3-lsq: formats whose scale alpha is a parameter (ParetoQ, arXiv 2502.02631).

    SEQ   index = round(clip(w / alpha, +-0.99) * n - c)        w^ = alpha * (index + c) / n
          seq2: n = 2, c = 1/2, levels +-1/4, +-3/4;  seq-ternary: n = 3/2, c = 0, levels 0, +-2/3
    LSQ   index = clip(round(w / alpha), -4, 3)                 w^ = alpha * index
          int2-lsq: -1 .. 2; int3-lsq: -3 .. 4; alpha has a sign, so that a group leans to either side

Straight-through gradients, with x = w / alpha and "inside" where x itself was not clipped:

    dL/dw_i = g_i [i inside]        dL/dalpha = s * sum_i g_i (level_i - [i inside] x_i),   s = 1 / sqrt(weights * Qp)

s is LSQ's gradient scale over all weights of the matrix; Qp is the largest positive integer of the bit width (1 or 3).
A clipped weight contributes its level, the derivative of alpha * level.  (ParetoQ's released code contributes 1 for a
clipped seq-ternary weight whose level is 2/3; this does not follow it there.)  |alpha| stays above 1e-5.

int2-lsq begins as int2 does, where the zero point is in the middle: alpha is int2's scale, negative for zero point 2.
In training the zero point stays, so no weight that becomes the largest of its group turns the whole grid around; and
what is packed is int2, scale |alpha| and zero point 1 or 2.  A sign that does change goes through a scale of 1e-5.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bitdistill_ray.core import Format, Rounding, ScaleDtype
from bitdistill_ray.quant.affine import Affine
from bitdistill_ray.quant.quantizer import Quantizer, register
from bitdistill_ray.quant.rounding import MIN_SCALE, round_, round_scale


class Learnable(Quantizer):
    """`low <= w / alpha <= high`, times `steps`, less `shift`, rounded; the first alpha is max|w| / `peak`."""

    def __init__(self, *, low: float, high: float, steps: float, shift: float, first_code: int, qp: int, peak: int):
        self.low, self.high, self.steps, self.shift = low, high, steps, shift
        self.first_code, self.qp, self.peak = first_code, qp, peak

    def raw_scale(self, w_RGS: Tensor) -> Tensor:
        low_RG1, high_RG1 = w_RGS.aminmax(dim=-1, keepdim=True)
        return high_RG1.maximum(-low_RG1).div(self.peak).clamp(min=MIN_SCALE)

    def encode(self, w_RGS: Tensor, scale_RGC: Tensor, zero_RG1: Tensor | None, rounding: Rounding) -> Tensor:
        clipped_RGS = (w_RGS / scale_RGC).clamp_(self.low, self.high)
        return round_(clipped_RGS.mul_(self.steps).sub_(self.shift), rounding)

    def code_offset(self, zero_RG1: Tensor | None) -> float:
        return float(-self.first_code)

    def decode(self, index_RGS: Tensor, scale_RGC: Tensor) -> Tensor:
        return index_RGS.add_(self.shift).div_(self.steps).mul_(scale_RGC)

    def gradient(
        self, grad_RGS: Tensor, w_RGS: Tensor, scale_RGC: Tensor, zero_RG1: Tensor | None, rounding: Rounding
    ) -> tuple[Tensor, Tensor]:
        x_RGS = w_RGS / scale_RGC
        inside_RGS = ((x_RGS >= self.low) & (x_RGS <= self.high)).to(w_RGS.dtype)
        level_RGS = self.decode(self.encode(w_RGS, scale_RGC, zero_RG1, rounding), scale_RGC.new_ones(()))
        slope_RGS = level_RGS.sub_(x_RGS.mul_(inside_RGS))
        return grad_RGS * inside_RGS, slope_RGS.mul_(grad_RGS).sum(dim=-1, keepdim=True)

    def alpha_gradient_scale(self, weights: int) -> float:
        return 1.0 / math.sqrt(weights * self.qp)


class LearnedAffine(Affine):
    """Affine integers with a learned scale; alpha's sign says which of the two middle zero points a group has."""

    def __init__(self, bits: int) -> None:
        super().__init__(bits)
        self.middle: int = 2 ** (bits - 1)
        self.qp = self.middle - 1

    def raw_scale(self, w_RGS: Tensor) -> Tensor:
        scale_RG1, zero_RG1 = self.scale_and_zero(w_RGS, ScaleDtype.FP32)
        assert zero_RG1 is not None
        return torch.where(zero_RG1 < self.middle, scale_RG1, -scale_RG1)

    def learned_scale_and_zero(self, alpha_RG1: Tensor, dtype: ScaleDtype) -> tuple[Tensor, Tensor | None]:
        zero_RG1 = torch.where(alpha_RG1 < 0, float(self.middle), float(self.middle - 1)).to(alpha_RG1.dtype)
        return round_scale(alpha_RG1.abs().clamp(min=MIN_SCALE), dtype), zero_RG1

    def gradient(
        self, grad_RGS: Tensor, w_RGS: Tensor, scale_RGC: Tensor, zero_RG1: Tensor | None, rounding: Rounding
    ) -> tuple[Tensor, Tensor]:
        low_RG1, high_RG1 = self._bounds(zero_RG1)
        x_RGS = w_RGS / scale_RGC
        inside_RGS = ((x_RGS >= low_RG1) & (x_RGS <= high_RG1)).to(w_RGS.dtype)
        level_RGS = self.encode(w_RGS, scale_RGC, zero_RG1, rounding)
        slope_RG1 = level_RGS.sub_(x_RGS.mul_(inside_RGS)).mul_(grad_RGS).sum(dim=-1, keepdim=True)
        return grad_RGS * inside_RGS, torch.where(low_RG1 <= -self.middle, -slope_RG1, slope_RG1)

    hold = Quantizer.hold
    alpha_gradient_scale = Learnable.alpha_gradient_scale


register(Format.SEQ2, Learnable(low=-0.99, high=0.99, steps=2.0, shift=0.5, first_code=-2, qp=1, peak=1))
register(Format.SEQ_TERNARY, Learnable(low=-0.99, high=0.99, steps=1.5, shift=0.0, first_code=-1, qp=1, peak=1))
register(Format.LSQ3, Learnable(low=-4.0, high=3.0, steps=1.0, shift=0.0, first_code=-4, qp=3, peak=3))
register(Format.INT2_LSQ, LearnedAffine(bits=2))
register(Format.INT3_LSQ, LearnedAffine(bits=3))
