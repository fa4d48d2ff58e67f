"""The largest and smallest weight of a group, zero included, and gradients routed back to them.

Zero counts as a member of every group, because int2, int3 and nf3 must be able to represent it: on a group that has
both signs this changes nothing; on a group of one sign (a constant, a short last group, a single weight) the published
formulas divide 0 by 0 or clip the whole group to nearly nothing, and this mends them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def extremes(w_RGS: Tensor) -> tuple[Tensor, Tensor]:
    """(bottom, top) of each group, [R, G, 1] each: min(w, 0) and max(w, 0)."""
    bottom_RG1, top_RG1 = w_RGS.aminmax(dim=-1, keepdim=True)
    return bottom_RG1.clamp(max=0), top_RG1.clamp(min=0)


def with_extremes_of(w_RGS: Tensor, like_RGS: Tensor) -> Tensor:
    """`w` clamped to the extremes of `like`, its largest and smallest weight moved onto them."""
    bottom_RG1, top_RG1 = extremes(like_RGS)
    w_RGS = w_RGS.clamp(bottom_RG1, top_RG1)
    largest_RG1 = w_RGS.argmax(dim=-1, keepdim=True)
    w_RGS = w_RGS.scatter(-1, largest_RG1, torch.where(top_RG1 > 0, top_RG1, w_RGS.gather(-1, largest_RG1)))
    smallest_RG1 = w_RGS.argmin(dim=-1, keepdim=True)
    return w_RGS.scatter(-1, smallest_RG1, torch.where(bottom_RG1 < 0, bottom_RG1, w_RGS.gather(-1, smallest_RG1)))


def route_(grad_RGS: Tensor, to_RG1: Tensor, w_RGS: Tensor, extreme_RG1: Tensor) -> Tensor:
    """Add `to` to the gradient of the weights that equal the extreme, shared evenly among ties, in place.

    This is what autograd does for `amax` and `amin`.  Where the extreme is the zero of no weight, nobody gets it.
    """
    at_RGS = (w_RGS == extreme_RG1).to(grad_RGS.dtype)
    share_RG1 = to_RG1 / at_RGS.sum(dim=-1, keepdim=True).clamp(min=1)
    return grad_RGS.addcmul_(at_RGS, share_RG1)
