"""The gradient of a sum over chunks, made chunk by chunk in the forward pass: no chunk is ever computed twice.

Checkpointing forgets a chunk's logits and computes both heads again in the backward pass, which costs a third more
products with the vocabulary.  The objective is linear in its sums, and the factor of each sum is known before the first
chunk (weights and `Totals`), so each chunk can make its gradient at once, while its logits are alive (as Liger's fused
losses do, here for any objective).  What stays is one gradient of the hidden states and one, in at least fp32, of the
head.

A chunk that makes its gradient beside its sums, in one kernel (`fused.py`), hands out the logits and what arrives at
them.

Not for ZeRO-3, whose parameters are whole only inside their module's own forward and backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Summed:
    """A chunk's sums [S], detached, and where the gradient of their weighted sum starts: `upstream` arrives at `root`.

    `root` may be the weighted sum itself; None then stands for 1.
    """

    sums_S: Tensor
    root: Tensor
    upstream: Tensor | None = None


ChunkSums = Callable[[Tensor, Tensor], Summed]
"""From the hidden states of a chunk [n, D] and the factors [S] to its sums; all else that it looks at is its own."""


def weighted_sums(
    hidden_nD: Tensor, parameters: Sequence[Tensor], chunks: Sequence[tuple[int, ChunkSums]], factors_S: Tensor
) -> tuple[Tensor, Tensor]:
    """(sum of `factors_S` times the sums of all chunks, with gradient; those sums [S], detached), in factors_S's dtype.

    hidden_nD   the hidden states of all chunks, in order
    parameters  what the chunks' functions multiply by and what wants a gradient: the head's weight, perhaps its bias
    chunks      tokens and function of each chunk
    """
    value, sums_S = _WeightedSums.apply(hidden_nD, factors_S, tuple(chunks), *parameters)  # type: ignore[no-untyped-call]
    return value, sums_S


class _WeightedSums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_nD: Tensor, factors_S: Tensor, chunks: tuple[tuple[int, ChunkSums], ...], *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        grad_nD = torch.empty_like(hidden_nD)
        grads: list[Tensor] = []
        total_S, begin = torch.zeros_like(factors_S), 0
        for tokens, sums_of in chunks:
            rows = slice(begin, begin + tokens)
            with torch.enable_grad():
                chunk_nD = hidden_nD[rows].detach().requires_grad_()
                made = sums_of(chunk_nD, factors_S)
            chunk_grad_nD, *new = torch.autograd.grad(made.root, (chunk_nD, *parameters), made.upstream)
            grad_nD[rows] = chunk_grad_nD
            if begin == 0:
                grads = [added.to(factors_S.dtype, copy=True) for added in new]
            else:
                for grad, added in zip(grads, new, strict=True):
                    grad += added
            total_S += made.sums_S
            begin += tokens
            del made, new, chunk_grad_nD
        kept = [grad.to(parameter.dtype) for grad, parameter in zip(grads, parameters, strict=True)]
        ctx.save_for_backward(grad_nD, *kept)
        ctx.mark_non_differentiable(total_S)
        return (total_S * factors_S).sum(), total_S

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        grad_nD, *grads = ctx.saved_tensors
        scale = upstream[0]
        return (grad_nD * scale.to(grad_nD.dtype), None, None, *(grad * scale.to(grad.dtype) for grad in grads))
