"""Layer states: each of some layers of the student is to give what the teacher's layer at its depth gives.

    part = mean over tokens and layers of | s / |s| - t / |t| |^2  =  2 (1 - cos(s, t))

s and t are the residual stream behind a layer.  Only its direction is compared: a few of its channels are hundreds of
times larger than the others and differ in size from token to token, and the norms in front of every reader take the
length out anyhow.  The last layer's states are left to the head, whose KL says all about them.  A 2-bit student's KL
after 10M tokens fell from .739 to .677 by them alone (docs/LOG.md).  FitNets (arXiv 1412.6550) and TinyBERT (arXiv
1909.10351) match states by their squared distance.

    B batch   L layers   T time   D hidden size
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitdistill_ray.core import LayerStates
from bitdistill_ray.errors import ModelError
from bitdistill_ray.losses.reduction import divide, valid_sum

SHORTEST = 1e-6  # a state of length 0 has no direction


def layer_states_loss(
    student: LayerStates, teacher: LayerStates, present_BT: Tensor, *, total_tokens: Tensor | None = None
) -> Tensor:
    """fp32 scalar with gradient.  `present_BT`: bool, False on padding; `total_tokens`: what the sum over tokens is
    divided by, if not by those of this batch.

    Raises:
        ModelError: another number of layers, or another hidden size.
    """
    s_BLTD, t_BLTD = student.hidden_BLTD, teacher.hidden_BLTD
    if s_BLTD.shape != t_BLTD.shape:
        what = f"{list(s_BLTD.shape)} of the student, {list(t_BLTD.shape)} of the teacher"
        raise ModelError("layer states", what, "Use models of one hidden size, or relations, which compare widths")
    total = present_BT.sum() if total_tokens is None else total_tokens
    sums = [
        valid_sum((_direction(s_BTD, present_BT) - _direction(t_BTD, present_BT)).square().sum(-1), present_BT)
        for s_BTD, t_BTD in zip(s_BLTD.unbind(1), t_BLTD.unbind(1), strict=True)
    ]
    return divide(torch.stack(sums).mean(), total)


def _direction(hidden_BTD: Tensor, present_BT: Tensor) -> Tensor:
    hidden_BTD = torch.where(present_BT.unsqueeze(-1), hidden_BTD.float(), 0.0)  # what stands on padding may be NaN
    length_BT1: Tensor = hidden_BTD.norm(dim=-1, keepdim=True)  # type: ignore[no-untyped-call,unused-ignore]
    return hidden_BTD / length_BT1.clamp(min=SHORTEST)
