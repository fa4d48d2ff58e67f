"""nf3: eight normal-float levels with one scale for each sign (BitDistiller's 3-bit format).

    s+ = max(w),  s- = -min(w)  of the group, each at least 1e-5        u = w / s+ where w >= 0, else w / s-
    code = how many of the seven cuts are <= u                          w^ = level[code] * (s+ or s-)

The cuts are half-way between levels, so an exact tie takes the upper level; `QuantSpec.rounding` has no say.  Levels
pass gradients through unchanged, and each scale carries its own share to the weight that sets it:

    dL/dw_i = g_i + [i = argmax] * sum over w_j >= 0 of g_j (level_j - u_j)
                  - [i = argmin] * sum over w_j < 0  of g_j (level_j - u_j)

A group of one sign, or of zeros, leaves a scale without an owner; the floor keeps it from dividing by zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitdistill_ray.core import Format, QuantSpec, Rounding
from bitdistill_ray.quant.extremes import extremes, route_, with_extremes_of
from bitdistill_ray.quant.quantizer import Quantizer, register
from bitdistill_ray.quant.rounding import MIN_SCALE

LEVELS = (
    -1.0,
    -0.5350227355957031,
    -0.2469314038753510,
    0.0,
    0.1833375245332718,
    0.3819939494132996,
    0.6229856610298157,
    1.0,
)
CUTS = (
    -0.7675113677978516,
    -0.39097706973552704,
    -0.1234657019376755,
    0.0916687622666359,
    0.2826657369732857,
    0.5024898052215576,
    0.8114928305149078,
)


class NormalFloat3(Quantizer):
    """Codes 0 .. 2 stand for the negative levels times s-, 3 .. 7 for zero and the positive levels times s+."""

    def raw_scale(self, w_RGS: Tensor) -> Tensor:
        bottom_RG1, top_RG1 = extremes(w_RGS)
        return torch.cat([top_RG1, -bottom_RG1], dim=-1).clamp(min=MIN_SCALE)

    def encode(self, w_RGS: Tensor, scale_RGC: Tensor, zero_RG1: Tensor | None, rounding: Rounding) -> Tensor:
        return self._code(self._relative(w_RGS, scale_RGC))

    def hold(self, w_RGS: Tensor, like_RGS: Tensor, spec: QuantSpec) -> Tensor:
        return with_extremes_of(w_RGS, like_RGS)

    def code_offset(self, zero_RG1: Tensor | None) -> float:
        return 0.0

    def decode(self, index_RGS: Tensor, scale_RGC: Tensor) -> Tensor:
        positive_RG1, negative_RG1 = torch.split(scale_RGC, 1, dim=-1)
        table_RGL = torch.cat([level * (negative_RG1 if level < 0 else positive_RG1) for level in LEVELS], dim=-1)
        return table_RGL.gather(-1, index_RGS.to(torch.int64))

    def gradient(
        self, grad_RGS: Tensor, w_RGS: Tensor, scale_RGC: Tensor, zero_RG1: Tensor | None, rounding: Rounding
    ) -> tuple[Tensor, None]:
        u_RGS = self._relative(w_RGS, scale_RGC)
        level_RGS = self.decode(self._code(u_RGS), torch.ones_like(scale_RGC))
        slope_RGS = level_RGS.sub_(u_RGS).mul_(grad_RGS)
        negative_RGS = (w_RGS < 0).to(w_RGS.dtype)
        below_RGS = slope_RGS * negative_RGS
        below_RG1 = below_RGS.sum(dim=-1, keepdim=True)
        above_RG1 = slope_RGS.sub_(below_RGS).sum(dim=-1, keepdim=True)
        bottom_RG1, top_RG1 = extremes(w_RGS)
        grad_w_RGS = route_(grad_RGS.clone(), above_RG1 * (top_RG1 >= MIN_SCALE), w_RGS, top_RG1)
        return route_(grad_w_RGS, -below_RG1 * (-bottom_RG1 >= MIN_SCALE), w_RGS, bottom_RG1), None

    def _relative(self, w_RGS: Tensor, scale_RGC: Tensor) -> Tensor:
        """u: every weight in units of the scale of its sign."""
        positive_RG1, negative_RG1 = torch.split(scale_RGC, 1, dim=-1)
        return w_RGS.clamp(min=0).div_(positive_RG1).add_(w_RGS.clamp(max=0).div_(negative_RG1))

    def _code(self, u_RGS: Tensor) -> Tensor:
        """uint8: how many cuts are <= u.  Faster than a binary search, and makes no 8-byte indices."""
        code_RGS = _as_bytes(u_RGS >= CUTS[0])
        for cut in CUTS[1:]:
            code_RGS.add_(_as_bytes(u_RGS >= cut))
        return code_RGS


def _as_bytes(mask: Tensor) -> Tensor:
    """0 and 1 in uint8; without a copy, but where compiling: Inductor of torch 2.11 cannot lower that view."""
    return mask.to(torch.uint8) if torch.compiler.is_compiling() else mask.view(torch.uint8)


register(Format.NF3, NormalFloat3())
