"""Ternary weights by absolute mean: BitNet b1.58, and the student of BitNet Distillation.

    scale = mean|w|        index = clip(round(w / scale), -1, 1)        w^ = index * scale

The gradient is the identity, with no clipping mask, and none flows through the scale (`w + (w^ - w).detach()` in the
authors' code).

The method is not idempotent: mean|w^| is the scale times the fraction of non-zeros, so quantising twice keeps the codes
and shrinks the scale to about 0.69 of what it was.  Bake codes once, from the latent weights.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from bitdistill_ray.core import Format, QuantSpec, Rounding
from bitdistill_ray.quant.quantizer import Quantizer, register
from bitdistill_ray.quant.rounding import MIN_SCALE, round_

HALF = 0.501  # of a scale: a weight of this size keeps its code
HOLD_STEPS = 8


class Ternary(Quantizer):
    """Codes 0, 1, 2 stand for -1, 0, 1 times the scale."""

    identity_gradient: ClassVar[bool] = True
    low_level: ClassVar[bool] = True

    def raw_scale(self, w_RGS: Tensor) -> Tensor:
        return w_RGS.abs().mean(dim=-1, keepdim=True).clamp(min=MIN_SCALE)

    def encode(self, w_RGS: Tensor, scale_RGC: Tensor, zero_RG1: Tensor | None, rounding: Rounding) -> Tensor:
        return round_(w_RGS / scale_RGC, rounding).clamp_(-1, 1)

    def hold(self, w_RGS: Tensor, like_RGS: Tensor, spec: QuantSpec) -> Tensor:
        """Weights that are not 0 grow or shrink together until the mean is right, never below half a scale."""
        scale_RG1, _ = self.scale_and_zero(like_RGS, spec.scale_dtype)
        size_RGS, kept_RGS = w_RGS.abs(), self.encode(w_RGS.clone(), scale_RG1, None, spec.rounding) != 0
        others_RG1 = torch.where(kept_RGS, 0.0, size_RGS).sum(dim=-1, keepdim=True)
        wanted_RG1 = scale_RG1 * w_RGS.shape[-1] - others_RG1
        least_RG1 = scale_RG1 * HALF
        for _ in range(HOLD_STEPS):
            have_RG1 = torch.where(kept_RGS, size_RGS, 0.0).sum(dim=-1, keepdim=True)
            grown_RGS = (size_RGS * (wanted_RG1 / have_RG1.clamp(min=MIN_SCALE))).maximum(least_RG1)
            size_RGS = torch.where(kept_RGS, grown_RGS, size_RGS)
        return torch.copysign(size_RGS, w_RGS)

    def code_offset(self, zero_RG1: Tensor | None) -> float:
        return 1.0

    def decode(self, index_RGS: Tensor, scale_RGC: Tensor) -> Tensor:
        return index_RGS.mul_(scale_RGC)

    def gradient(
        self, grad_RGS: Tensor, w_RGS: Tensor, scale_RGC: Tensor, zero_RG1: Tensor | None, rounding: Rounding
    ) -> tuple[Tensor, None]:
        return grad_RGS, None


register(Format.TERNARY, Ternary())
