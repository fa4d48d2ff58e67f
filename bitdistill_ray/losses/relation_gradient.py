"""Relation KL on a GPU, its gradient made head by head in the forward pass.

Checkpointed, with softmax and KL over [B, R, T, T] in fp32, relations took 110 ms of a 0.6B student's step of 393 on an
H100; this way 33 of 234.  Here each chunk of heads makes its logits in 16 bits, one kernel (`fused.row_kl`) turns them
into row KLs and the logits' gradient G, and with logits A A' the rows' gradient is (G + G') A.  What stays for the
backward pass is that gradient, as large as the rows themselves.

Shapes: those of relation.py
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bitdistill_ray.losses import fused

MASKED = -1e30  # of both sides' logits: exp is 0, and their difference is 0


def row_kl_sum(
    student_BRTW: Tensor, teacher_BRTW: Tensor, allowed_B1TT: Tensor, valid_BT: Tensor, heads_per_chunk: int
) -> Tensor:
    """Sum of KL(teacher || student) over all heads and the valid rows, fp32 with gradient; see `relation_rows`."""
    total: Tensor = _RowKLSum.apply(student_BRTW, teacher_BRTW, allowed_B1TT, valid_BT, heads_per_chunk)  # type: ignore[no-untyped-call]
    return total


class _RowKLSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student_BRTW: Tensor, teacher_BRTW: Tensor, allowed_B1TT: Tensor, valid_BT: Tensor, heads: int
    ) -> Tensor:
        grad_BRTW, total = torch.empty_like(student_BRTW), torch.zeros((), device=student_BRTW.device)
        barred_B1TT = ~allowed_B1TT
        chunks = [torch.split(tensor, heads, dim=1) for tensor in (student_BRTW, teacher_BRTW, grad_BRTW)]
        for student_BrTW, teacher_BrTW, made_BrTW in zip(*chunks, strict=True):
            rows_n = valid_BT.unsqueeze(1).expand(student_BrTW.shape[:3]).flatten()
            ours, theirs = (
                (rows @ rows.transpose(-1, -2)).masked_fill_(barred_B1TT, MASKED)
                for rows in (student_BrTW, teacher_BrTW.to(student_BrTW.dtype))
            )
            kl_n, grad_nT = fused.row_kl(ours.flatten(0, 2), theirs.flatten(0, 2), rows_n)
            total += torch.where(rows_n, kl_n, 0.0).sum()
            grad_BrTT = grad_nT.view_as(ours)
            made_BrTW.copy_(grad_BrTT @ student_BrTW)
            made_BrTW += grad_BrTT.transpose(-1, -2) @ student_BrTW
        ctx.save_for_backward(grad_BRTW)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (grad_BRTW,) = ctx.saved_tensors
        return grad_BRTW * upstream[0].to(grad_BRTW.dtype), None, None, None, None
