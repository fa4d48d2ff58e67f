"""The values of a top-k answer in a few bits each: how far below the likeliest token every other one lies.

    depth d_i = max(log p) - log p_i

The `near` likeliest entries, which carry most of the mass, share one code (0) that only says so; their depths follow
in more bits, as the root of the depth's share of the `knee`, which is finest at the top.  The others get the number of
one of 2**width - 1 equal cells from the knee, the shallowest of them, to the `reach`, the deepest.

The level needs no bits: the log of the tail's mass is stored in 16, and decoding scales the S probabilities so that
they and the tail sum to 1; so what one value is off by is not lost to the whole.  One code for all depths over the
whole reach was tried first: at S = 50 and 4 bits the loss came out 0.8 % too high, since the noise of the teacher's
values adds half its variance to any KL.    n records   S entries, by rising id   R near ones
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bitdistill_ray.cache.fields import from_bits, to_bits

STEP = 0.125  # of knee and reach, which are one byte each: depths end at 31.875, where p is 1e-14 of the largest
DEEPEST = 255 * STEP
NO_TAIL = -1e4
SMALLEST_HEAD = 1e-4  # the tail's log is stored as at most minus this, so that there is something beside it


@dataclass(frozen=True, slots=True, kw_only=True)
class Depths:
    """How `entries` log-probabilities are coded: bits of a code, bits of a near depth, near entries."""

    entries: int
    width: int
    near_width: int
    near: int

    @classmethod
    def of(cls, entries: int) -> Depths:
        """Bits by the number of entries: where there are fewer, ids take more of the budget."""
        many = entries >= 64
        return cls(entries=entries, width=5 if many else 4, near_width=7 if many else 6, near=max(1, entries // 7))

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """Bits of the fields: codes, near depths, knee, reach, tail."""
        return self.entries * self.width, self.near * self.near_width, 8, 8, 16

    def encode(self, logprobs_nS: np.ndarray) -> tuple[np.ndarray, ...]:
        """Bits of the fields, from log-probabilities of any float dtype; what is not a number counts as deep."""
        log_nS = np.nan_to_num(logprobs_nS.astype(np.float64), nan=NO_TAIL, neginf=NO_TAIL, posinf=0.0)
        depth_nS = np.minimum(log_nS.max(axis=1, keepdims=True) - log_nS, DEEPEST)
        order_nS = np.argsort(depth_nS, axis=1, kind="stable")
        near_nR = np.sort(order_nS[:, : self.near], axis=1)  # by rising id, as decoding finds them
        near_depth_nR = np.take_along_axis(depth_nS, near_nR, axis=1)
        shallowest_n1 = np.take_along_axis(depth_nS, order_nS[:, min(self.near, self.entries - 1)][:, None], axis=1)
        knee_n1 = np.minimum(np.floor(shallowest_n1 / STEP), 254)
        reach_n1 = np.ceil(depth_nS.max(axis=1, keepdims=True) / STEP)
        cell_n1 = np.maximum(reach_n1 - knee_n1, 1) * STEP / self._cells
        codes_nS = 1 + np.clip(np.floor((depth_nS - knee_n1 * STEP) / cell_n1), 0, self._cells - 1).astype(np.int64)
        np.put_along_axis(codes_nS, near_nR, 0, axis=1)
        root_nR = np.sqrt(near_depth_nR / ((knee_n1 + 1) * STEP))
        tail_n1 = np.maximum(1.0 - np.exp(log_nS).sum(axis=1, keepdims=True), 0.0)
        with np.errstate(divide="ignore"):
            log_tail_n1 = np.clip(np.log(tail_n1), NO_TAIL, -SMALLEST_HEAD).astype("<f2")
        return (
            to_bits(codes_nS, self.width),
            to_bits(np.rint(root_nR * (2**self.near_width - 1)), self.near_width),
            to_bits(knee_n1, 8),
            to_bits(reach_n1, 8),
            to_bits(log_tail_n1.view("<u2"), 16),
        )

    def decode(self, codes: np.ndarray, near: np.ndarray, knee: np.ndarray, reach: np.ndarray,
               tail: np.ndarray) -> np.ndarray:  # fmt: skip
        """fp32 log-probabilities [n, S] that sum, with the tail, to 1."""
        codes_nS, knee_n1, reach_n1 = from_bits(codes, self.width), from_bits(knee, 8), from_bits(reach, 8)
        cell_n1 = np.maximum(reach_n1 - knee_n1, 1) * STEP / self._cells
        depth_nS = knee_n1 * STEP + (codes_nS - 0.5) * cell_n1
        near_nR = np.argsort(codes_nS > 0, axis=1, kind="stable")[:, : self.near]
        root_nR = from_bits(near, self.near_width) / (2**self.near_width - 1)
        np.put_along_axis(depth_nS, near_nR, root_nR**2 * (knee_n1 + 1) * STEP, axis=1)
        log_tail_n1 = from_bits(tail, 16).astype("<u2").view("<f2").astype(np.float64)
        level_n1 = np.log1p(-np.exp(log_tail_n1)) - np.log(np.exp(-depth_nS).sum(axis=1, keepdims=True))
        return np.asarray(level_n1 - depth_nS, dtype=np.float32)

    @property
    def _cells(self) -> int:
        return (1 << self.width) - 1
