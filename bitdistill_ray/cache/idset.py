"""A set of S token ids of a vocabulary V in about S * (log2(V / S) + 2) bits: Elias and Fano's code.

The ids of a top-k answer need no order of their own, since their values give it back.  Sorted, each id keeps its `low`
bits as they are; the high parts, which only rise, are one run of bits in which the i-th id sets bit high + i.  That is
195 bytes at S = 128 and V = 151,936, where ids in their order take 276 and no code of a set gets below 187.  Golomb
and Rice coded gaps are as small, but every record would have another length.    n records   S ids of a record
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bitdistill_ray.cache.fields import from_bits, to_bits
from bitdistill_ray.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class IdSet:
    """How `entries` different ids below `vocabulary` are coded."""

    vocabulary: int
    entries: int

    @property
    def low_bits(self) -> int:
        """Bits of an id that are stored as they are."""
        return max(0, (self.vocabulary // self.entries).bit_length() - 1)

    @property
    def sizes(self) -> tuple[int, int]:
        """Bits of the two fields: low parts, high parts."""
        return self.entries * self.low_bits, ((self.vocabulary - 1) >> self.low_bits) + self.entries

    def encode(self, ids_nS: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Bits of the two fields.

        Raises:
            DataError: the ids of a row do not rise, or one is outside the vocabulary.
        """
        ids_nS = ids_nS.astype(np.int64)
        if ids_nS.size and (ids_nS.min() < 0 or ids_nS.max() >= self.vocabulary or (np.diff(ids_nS) <= 0).any()):
            raise DataError("teacher answer", f"token ids that are not {self.entries} different ones below "
                            f"{self.vocabulary}", "Report this as a bug")  # fmt: skip
        low_nS, high_nS = ids_nS & ((1 << self.low_bits) - 1), ids_nS >> self.low_bits
        highs = np.zeros((len(ids_nS), self.sizes[1]), dtype=np.uint8)
        np.put_along_axis(highs, high_nS + np.arange(self.entries), 1, axis=1)
        return to_bits(low_nS, self.low_bits), highs

    def decode(self, lows: np.ndarray, highs: np.ndarray) -> np.ndarray:
        """int64 [n, S], rising.

        Raises:
            DataError: the bits are no code of `entries` ids.
        """
        if not (highs.sum(axis=1, dtype=np.int64) == self.entries).all():
            raise DataError("teacher cache", f"a record that does not hold {self.entries} ids",
                            "Report this as a bug: the block's checksum is right")  # fmt: skip
        place_nS = np.nonzero(highs)[1].reshape(len(highs), self.entries)
        high_nS = (place_nS - np.arange(self.entries)) << self.low_bits
        return high_nS + from_bits(lows, self.low_bits) if self.low_bits else high_nS
