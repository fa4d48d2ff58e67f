"""What logs say about codes: how often each occurs, how many changed, how many stand for zero; where weights lie."""

from __future__ import annotations

import torch
from torch import Tensor

from bitdistill_ray.core import Format
from bitdistill_ray.quant.base import QuantizedTensor, dequantize
from bitdistill_ray.quant.grouping import Grouping

NEAR_CUT = 0.1  # units of the scale


def code_histogram(q: QuantizedTensor) -> Tensor:
    """int64 [code_count]: how many weights have each code."""
    return torch.bincount(q.codes_NK.flatten(), minlength=q.spec.format.code_count)


def flip_rate(codes_a: Tensor, codes_b: Tensor) -> float:
    """Fraction of the codes that differ; about 0.05 % a step is a healthy ternary run (arXiv 2412.04787)."""
    return (codes_a != codes_b).float().mean().item()


def zero_count(q: QuantizedTensor) -> Tensor:
    """int64 scalar, on the codes' device and not read: how many weights are exactly 0 (of normally distributed ones,
    ternary makes about 31 % so)."""
    return (dequantize(q) == 0).sum()


def relative_weights(w_NK: Tensor, q: QuantizedTensor) -> Tensor:
    """Every weight of the matrix that `q` was made of in units of its scale (nf3: that of its sign), flat, in no
    particular order; float32."""
    grouping, relative = Grouping.of(q.spec, q.shape), []
    for w_RGS, scale_RGC in zip(grouping.split(w_NK.float()), grouping.split_groups(q.scale), strict=True):
        scale_RGS = scale_RGC[..., :1]
        if scale_RGC.shape[-1] == 2:
            scale_RGS = torch.where(w_RGS < 0, scale_RGC[..., 1:], scale_RGC[..., :1])
        relative.append((w_RGS / scale_RGS).flatten())
    return torch.cat(relative)


def near_cut_count(w_NK: Tensor, q: QuantizedTensor) -> Tensor:
    """int64 scalar, not read: the ternary weights within `NEAR_CUT` of half a scale, where 0 turns into 1 or -1, and
    where BitNet Distillation's students gather as they learn; 0 for another format."""
    if q.spec.format is not Format.TERNARY:
        return torch.zeros((), dtype=torch.int64, device=w_NK.device)
    return ((relative_weights(w_NK, q).abs() - 0.5).abs() <= NEAR_CUT).sum()
