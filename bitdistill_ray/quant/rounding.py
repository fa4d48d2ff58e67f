"""Rounding of weights to integers, and of scales to the dtype in which they are stored.

Both are the identity for gradients (straight-through); the quantisers' own gradients take that into account.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitdistill_ray.core import Rounding, ScaleDtype

MIN_SCALE = 1e-5  # of a range, an absolute mean or an alpha: the floor that both methods' authors use
_FP16_SMALLEST = 2.0**-24  # the smallest subnormal: anything lower would be stored as 0
_FP16_LARGEST = 65504.0


def round_(x: Tensor, rounding: Rounding) -> Tensor:
    """Round x to integers, in place.

    HALF_EVEN: IEEE's.  HALF_AWAY: sign(x) * floor(|x| + 1/2), the BitDistiller trainer's.  The result has no negative
    zero, so that a value decoded from here and one decoded from a stored code are equal bit for bit.
    """
    away = rounding is Rounding.HALF_AWAY
    x = x.add_(torch.copysign(torch.full_like(x, 0.5), x)).trunc_() if away else x.round_()
    return x.add_(0.0)


def round_scale(scale: Tensor, dtype: ScaleDtype) -> Tensor:
    """The nearest scale that `dtype` can store, never 0 and never infinite; shape and dtype stay.

    FP32 is no rounding at all for a float64 scale, which only gradient checks use.
    """
    if dtype is ScaleDtype.FP16:
        return scale.clamp(_FP16_SMALLEST, _FP16_LARGEST).to(torch.float16).to(scale.dtype)
    return scale.clamp(max=torch.finfo(scale.dtype).max)
