"""From values per token to one number, exactly, also over micro-batches and ranks.

Valid tokens differ from rank to rank.  A mean of the ranks' own means would weigh a token by its neighbours' padding;
what is wanted is (sum over all valid tokens) / (number of all valid tokens).  So each loss is its own sum divided by
`Totals`, which the caller adds up over everything that one optimiser step sees:

    totals = Totals.count(labels, segments) + ...          over the micro-batches of the step
    torch.distributed.all_reduce(totals.counts)            over the ranks
    totals = totals.shared_by(world_size * micro_batches)  how many losses will be *averaged* into the step

Data-parallel engines average the gradients of the ranks, and DeepSpeed also divides each loss by the accumulation
steps, which is why the total is shared by as many losses: sum / (total / k), averaged over k, is sum / total.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitdistill_ray.losses.objective import Reduction, Scope


@dataclass(frozen=True, slots=True)
class Totals:
    """What sums are divided by: `counts` is float64 [3]: target positions, present positions, sequences."""

    counts: Tensor

    @classmethod
    def count(cls, labels_BT: Tensor, segment_BT: Tensor | None = None) -> Totals:
        """Count one micro-batch: labels other than -100, segments other than -1 (None: all present), rows."""
        targets = (labels_BT >= 0).sum()
        present = targets.new_tensor(labels_BT.numel()) if segment_BT is None else (segment_BT >= 0).sum()
        return cls(torch.stack((targets, present, targets.new_tensor(labels_BT.shape[0]))).double())

    def __add__(self, other: Totals) -> Totals:
        return Totals(self.counts + other.counts)

    def shared_by(self, losses: int) -> Totals:
        """The divisor of each of `losses` losses whose *average* is to be divided by this total."""
        return Totals(self.counts / losses)

    @property
    def present(self) -> Tensor:
        """Positions that are not padding."""
        return self.counts[1]

    def divisor(self, scope: Scope, reduction: Reduction) -> Tensor:
        """What a term's sum is divided by."""
        if reduction is Reduction.SEQUENCE_SUM:
            return self.counts[2]
        return self.counts[0] if scope is Scope.TARGETS else self.counts[1]


def valid_sum(values_n: Tensor, valid_n: Tensor) -> Tensor:
    """Sum of the values where `valid_n` (bool) holds."""
    return torch.where(valid_n, values_n, 0.0).sum()


def divide(total: Tensor, divisor: Tensor | float) -> Tensor:
    """total / divisor, and 0 where there was nothing to count."""
    divisor = torch.as_tensor(divisor, device=total.device)
    return total / torch.where(divisor > 0, divisor, 1.0).to(total.dtype)


def valid_mean(values_n: Tensor, valid_n: Tensor, *, total: Tensor | float | None = None) -> Tensor:
    """Sum over valid tokens / `total`; None: their own number.  0 where no token is valid."""
    return divide(valid_sum(values_n, valid_n), valid_n.sum() if total is None else total)


def sequence_mean(values_BT: Tensor, valid_BT: Tensor, *, total: Tensor | float | None = None) -> Tensor:
    """Sum over valid tokens / number of sequences (`total`; None: rows): the reduction of BitDistiller's code."""
    return divide(valid_sum(values_BT, valid_BT), float(values_BT.shape[0]) if total is None else total)
