"""Which weights share a scale: every granularity seen as regular groups `[R, G, S]`.

A matrix is read as R rows of one length, and each row is cut into groups of S weights:

    TENSOR  1 row of N*K, 1 group        ROW    N rows of K, 1 group each
    GROUP   N rows of K, groups of S     BLOCK  1 row of N*K, groups of S

Where S does not divide the row, the shorter last group becomes a second part `[R, 1, tail]`.  A quantiser therefore
only ever meets regular groups: nothing is padded, so no padding can touch a statistic, and where S divides the row
(the usual case) `split` and `join` are views that cost nothing.

Shape suffixes beyond those of `core`: R rows, S weights of a group (or segment), C scales of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bitdistill_ray.core import Granularity, QuantSpec


@dataclass(frozen=True, slots=True)
class Grouping:
    """`rows` rows of `length` weights, in groups of `size`."""

    rows: int
    length: int
    size: int

    @classmethod
    def of(cls, spec: QuantSpec, shape: tuple[int, int]) -> Grouping:
        """How `spec` groups an [N, K] matrix."""
        N, K = shape
        rows, length = (N, K) if spec.granularity in (Granularity.ROW, Granularity.GROUP) else (1, N * K)
        return cls(rows, length, min(spec.group_size or length, length))

    @property
    def tail(self) -> int:
        """Weights in the shorter last group of a row; 0 where all groups are full."""
        return self.length % self.size

    @property
    def groups(self) -> int:
        """Groups of a row, a shorter last one included."""
        return -(-self.length // self.size)

    def split(self, w_NK: Tensor) -> tuple[Tensor, ...]:
        """The full groups [R, G, S] and, where there is one, the shorter last group [R, 1, tail]."""
        whole = self.length // self.size
        if not self.tail:
            return (w_NK.reshape(self.rows, whole, self.size),)
        full, last = torch.split(w_NK.reshape(self.rows, self.length), [whole * self.size, self.tail], dim=1)
        return torch.unflatten(full, 1, (whole, self.size)), last.unsqueeze(1)

    def join(self, parts: Sequence[Tensor], shape: tuple[int, int]) -> Tensor:
        """Inverse of `split`: the [N, K] matrix."""
        if len(parts) == 1:
            return parts[0].reshape(shape)
        return torch.cat([part.flatten(1) for part in parts], dim=1).reshape(shape)

    def split_groups(self, per_group: Tensor) -> tuple[Tensor, ...]:
        """One value (or C values) per group, as stored, to one [R, G, C] per part of `split`."""
        values_RGC = per_group.reshape(self.rows, self.groups, -1)
        return torch.split(values_RGC, [self.groups - 1, 1], dim=1) if self.tail else (values_RGC,)

    def join_groups(self, parts: Sequence[Tensor]) -> Tensor:
        """Inverse of `split_groups`, as [R, G, C]."""
        return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)
