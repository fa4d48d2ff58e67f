"""Rounding of weights to integers, and of scales to the dtype in which they are stored.

Both are the identity for gradients (straight-through); the quantisers' own gradients take that into account.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitdistill_ray.core import Rounding, ScaleDtype

MIN_SCALE = 1e-5  # of a range, an absolute mean or an alpha: the floor that both methods' authors use
_FP16_SMALLEST = 2.0**-24  # the smallest subnormal: anything lower would be stored as 0
_FP16_NORMAL = 2.0**-14  # below this, fp16 numbers are multiples of the smallest
_FP16_LARGEST = 65504.0
_DROPPED_BITS = 13  # of float32's 23 mantissa bits, fp16 keeps 10


def round_(x: Tensor, rounding: Rounding) -> Tensor:
    """Round x to integers, in place.

    HALF_EVEN: IEEE's.  HALF_AWAY: sign(x) * floor(|x| + 1/2), the BitDistiller trainer's.  The result has no negative
    zero, so that a value decoded from here and one decoded from a stored code are equal bit for bit.
    """
    away = rounding is Rounding.HALF_AWAY
    x = x.add_(torch.copysign(torch.full_like(x, 0.5), x)).trunc_() if away else x.round_()
    return x.add_(0.0)


def round_scale(scale: Tensor, dtype: ScaleDtype) -> Tensor:
    """The nearest scale that `dtype` can store, ties to even, never 0 and never infinite; shape and dtype stay.

    FP32 is no rounding at all for a float64 scale, which only gradient checks use.

    FP16 is rounded on the bits, because compilers drop a conversion to fp16 and back (TorchInductor does, to be more
    precise), and a trained weight would then have other codes than the exported one.
    """
    if dtype is ScaleDtype.FP32:
        return scale.clamp(max=torch.finfo(scale.dtype).max)
    single = scale.clamp(_FP16_SMALLEST, _FP16_LARGEST).to(torch.float32)
    bits = single.view(torch.int32)
    odd = (bits >> _DROPPED_BITS) & 1
    half = (1 << (_DROPPED_BITS - 1)) - 1
    normal = (((bits + half + odd) >> _DROPPED_BITS) << _DROPPED_BITS).view(torch.float32)
    subnormal = (single / _FP16_SMALLEST).round() * _FP16_SMALLEST
    return torch.where(single < _FP16_NORMAL, subnormal, normal).to(scale.dtype)


def softened(x: Tensor, quantised: Tensor, strength: Tensor | None) -> Tensor:
    """x + strength * (quantised - x): x itself at 0 and `quantised` at 1, bit for bit; None is 1."""
    return quantised if strength is None else torch.lerp(x, quantised, strength.to(quantised.dtype))
