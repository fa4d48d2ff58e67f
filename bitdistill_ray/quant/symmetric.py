"""int8: symmetric integers, for what 2 or 3 bits are too few for (the LM head and the embeddings).

    scale = max(max|w|, 1e-5) / 127        index = clip(round(w / scale), -127, 127)        w^ = index * scale

At 8 bits a zero point would buy half a bit where all weights of a group have one sign, and embeddings never have.  The
gradient is the affine formats': the scale is a function of the weights, rounding is the identity, so that

    dL/dw_i = g_i [i inside] + sign(w_i) [i = argmax|w|] / 127 * sum_j g_j (index_j - [j inside] w_j / scale)
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitdistill_ray.core import Format, QuantSpec, Rounding
from bitdistill_ray.quant.extremes import route_
from bitdistill_ray.quant.quantizer import Quantizer, register
from bitdistill_ray.quant.rounding import MIN_SCALE, round_


class Symmetric(Quantizer):
    """Codes 1 .. 2^bits - 1 stand for (code - 2^(bits-1)) times the scale; code 0 is never made."""

    def __init__(self, bits: int) -> None:
        self.largest: int = 2 ** (bits - 1) - 1

    def raw_scale(self, w_RGS: Tensor) -> Tensor:
        return w_RGS.abs().amax(dim=-1, keepdim=True).clamp(min=MIN_SCALE) / self.largest

    def encode(self, w_RGS: Tensor, scale_RGC: Tensor, zero_RG1: Tensor | None, rounding: Rounding) -> Tensor:
        return round_(w_RGS / scale_RGC, rounding).clamp_(-self.largest, self.largest)

    def code_offset(self, zero_RG1: Tensor | None) -> float:
        return self.largest + 1.0

    def decode(self, index_RGS: Tensor, scale_RGC: Tensor) -> Tensor:
        return index_RGS.mul_(scale_RGC)

    def gradient(
        self, grad_RGS: Tensor, w_RGS: Tensor, scale_RGC: Tensor, zero_RG1: Tensor | None, rounding: Rounding
    ) -> tuple[Tensor, None]:
        ratio_RGS = w_RGS / scale_RGC
        index_RGS = round_(ratio_RGS.clone(), rounding)
        inside_RGS = (index_RGS.abs() <= self.largest).to(w_RGS.dtype)
        slope_RGS = index_RGS.clamp_(-self.largest, self.largest).sub_(ratio_RGS.mul_(inside_RGS))
        size_RGS = w_RGS.abs()
        top_RG1 = size_RGS.amax(dim=-1, keepdim=True)
        to_RG1 = slope_RGS.mul_(grad_RGS).sum(dim=-1, keepdim=True) / self.largest * (top_RG1 >= MIN_SCALE)
        share_RGS = route_(torch.zeros_like(w_RGS), to_RG1, size_RGS, top_RG1)
        return (grad_RGS * inside_RGS).addcmul_(share_RGS, w_RGS.sign()), None

    def hold(self, w_RGS: Tensor, like_RGS: Tensor, spec: QuantSpec) -> Tensor:
        """Weights clamped to the range of `like`, the largest of them moved onto its end."""
        top_RG1 = like_RGS.abs().amax(dim=-1, keepdim=True)
        w_RGS = w_RGS.clamp(-top_RG1, top_RG1)
        largest_RG1 = w_RGS.abs().argmax(dim=-1, keepdim=True)
        return w_RGS.scatter(-1, largest_RG1, torch.copysign(top_RG1, w_RGS.gather(-1, largest_RG1)))


register(Format.INT8, Symmetric(bits=8))
