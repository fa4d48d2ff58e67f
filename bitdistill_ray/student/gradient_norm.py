"""The norm of all gradients in a few launches, and clipping by it without a question to the device.

ZeRO-1 and ZeRO-2 cast every gradient to fp64 and take its norm by itself: 508 small kernels in a 0.6B student's step on
an H100, 5.4 ms of them and more of launching.  Here torch's foreach kernels take the norms of all gradients at once, in
fp32, and only these few hundred numbers are added up in fp64.  Before it clips, DeepSpeed asks the device whether that
norm is finite, once for each parameter group, so that the host waits for the whole backward pass and the device then
for the host; here the device clips by what it finds, and the worker looks at the norm when it reads the step's row.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

METHOD = "get_grad_norm_direct"  # of DeepSpeed's ZeRO-1 and ZeRO-2 optimiser
CLIP = "unscale_and_clip_grads"
EPSILON = 1e-6  # DeepSpeed's, added to the norm
INVALID = -1.0  # what DeepSpeed takes for a norm that is not finite


def norm_at_once(optimizer: Any) -> None:
    """Give a ZeRO-1 or ZeRO-2 optimiser this norm; one of another kind keeps its own, which is slower and not wrong."""
    original = getattr(optimizer, METHOD, None)
    if original is None:
        return

    def norm(gradients: Iterable[Tensor], params: Any, norm_type: float = 2) -> Tensor:
        own = [gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False)]
        if norm_type != 2 or not own:
            found: Tensor = original(own, params, norm_type)
            return found
        return global_norm(own, optimizer.dp_process_group)

    setattr(optimizer, METHOD, norm)


def clip_unasked(optimizer: Any) -> None:
    """Let a ZeRO-1 or ZeRO-2 optimiser clip without reading its norm; a norm that is not finite zeroes what is finite,
    as DeepSpeed does, and whoever reads it later must stop."""
    original = getattr(optimizer, CLIP, None)
    if original is None:
        return

    def clip(groups: Iterable[Tensor | list[Tensor]], total_norm: Any) -> None:
        if not (isinstance(total_norm, Tensor) and optimizer.clip_grad > 0):
            original(groups, total_norm)
            return
        norm = torch.where(total_norm < 0, math.inf, total_norm) / optimizer.loss_scale
        factor = 1.0 / (((norm + EPSILON) / optimizer.clip_grad).clamp(min=1.0) * optimizer.loss_scale)
        for group in groups:
            for gradient in group if isinstance(group, list) else [group]:
                gradient.data.mul_(factor)

    setattr(optimizer, CLIP, clip)


def global_norm(gradients: list[Tensor], group: Any = None) -> Tensor:
    """fp32 scalar: the 2-norm of all tensors of all ranks of `group` as one vector, -1 where it is not finite."""
    norms = torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32))
    square = norms.double().square().sum()
    dist.all_reduce(square, group=group)
    total = square.sqrt().float()
    return torch.where(total.isfinite(), total, INVALID)
