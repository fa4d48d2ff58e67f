"""A top-k answer, token by token, as records of one length: `lossless` or `compact`.

    bytes of a token        k = 128   k = 50   (V = 151,936)
    int32 ids, fp16 values      768      300    as on the wire
    lossless                    451      185    ids as a set, fp16 values as they are
    compact                     295      119    ids as a set, depths in a few bits (depths.py)

Both give entries back in the order of the wire: likeliest first, ties by id.    n tokens   S entries
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bitdistill_ray.cache.depths import Depths
from bitdistill_ray.cache.fields import join, split, to_bits
from bitdistill_ray.cache.idset import IdSet
from bitdistill_ray.core import Coding
from bitdistill_ray.errors import DataError

CHUNK = 2048  # tokens whose bits are unpacked at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class TopKCoder:
    """The records of one payload."""

    coding: Coding
    vocabulary: int
    entries: int

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's record."""
        return -(-sum(self._sizes) // 8)

    def encode(self, ids_nS: np.ndarray, logprobs_nS: np.ndarray) -> np.ndarray:
        """uint8 [n, token_bytes] from different ids and their log-probabilities, in any order.

        Raises:
            DataError: ids that are no set, or values that are not fp16 where the coding is lossless.
        """
        if self.coding is Coding.LOSSLESS and logprobs_nS.dtype != np.float16:
            raise DataError("teacher cache", f"lossless coding of {logprobs_nS.dtype} values, it keeps float16",
                            "Report this as a bug")  # fmt: skip
        chunks = [self._encode(ids_nS[a : a + CHUNK], logprobs_nS[a : a + CHUNK]) for a in range(0, len(ids_nS), CHUNK)]
        return np.concatenate([np.zeros((0, self.token_bytes), np.uint8), *chunks])

    def decode(self, records: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(ids int32, log-probabilities fp16 if lossless, else fp32), both [n, S], likeliest first."""
        parts = [self._decode(records[a : a + CHUNK]) for a in range(0, len(records), CHUNK)]
        value = np.float16 if self.coding is Coding.LOSSLESS else np.float32
        none = np.zeros((0, self.entries))
        return (
            np.concatenate([none.astype(np.int32), *(ids for ids, _ in parts)]),
            np.concatenate([none.astype(value), *(values for _, values in parts)]),
        )

    def _encode(self, ids_nS: np.ndarray, logprobs_nS: np.ndarray) -> np.ndarray:
        order_nS = np.argsort(ids_nS, axis=1, kind="stable")
        sets = self._ids.encode(np.take_along_axis(ids_nS, order_nS, axis=1))
        values_nS = np.take_along_axis(logprobs_nS, order_nS, axis=1)
        if self.coding is Coding.LOSSLESS:
            return join([*sets, to_bits(values_nS.astype("<f2").view("<u2"), 16)])
        return join([*sets, *self._depths.encode(values_nS)])

    def _decode(self, records: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        lows, highs, *values = split(records, self._sizes)
        ids_nS = self._ids.decode(lows, highs).astype(np.int32)
        if self.coding is Coding.LOSSLESS:
            packed = np.packbits(values[0], axis=1, bitorder="little")
            logprobs_nS = packed.view("<f2").astype(np.float16, copy=False)
        else:
            logprobs_nS = self._depths.decode(*values)
        return likeliest_first(ids_nS, logprobs_nS)

    @property
    def _ids(self) -> IdSet:
        return IdSet(vocabulary=self.vocabulary, entries=self.entries)

    @property
    def _depths(self) -> Depths:
        return Depths.of(self.entries)

    @property
    def _sizes(self) -> tuple[int, ...]:
        values = (16 * self.entries,) if self.coding is Coding.LOSSLESS else self._depths.sizes
        return (*self._ids.sizes, *values)


def likeliest_first(ids_nS: np.ndarray, logprobs_nS: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Entries, given by rising id, in the order of the wire: falling value, ties by id."""
    order_nS = np.argsort(-logprobs_nS, axis=1, kind="stable")
    return np.take_along_axis(ids_nS, order_nS, axis=1), np.take_along_axis(logprobs_nS, order_nS, axis=1)
