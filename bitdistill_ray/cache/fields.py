"""Fixed-width integers of any number of bits, side by side in a record, for many records at a time.

A token's record has the same length whatever it holds, so blocks need no offsets and nothing here is a loop over
tokens: a field is a [n, count] array of integers of `width` bits, and a record the bits of its fields in their order,
lowest bit first, filled up to a byte.    n records
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def to_bits(values: np.ndarray, width: int) -> np.ndarray:
    """uint8 [n, count * width] of zeros and ones, lowest first, from unsigned integers [n, count] below 2**width."""
    wide = "<u2" if width <= 16 else "<u4"
    stored = np.ascontiguousarray(values).astype(wide)
    bits = np.unpackbits(stored.view(np.uint8), axis=1, bitorder="little")
    per_value = bits.reshape(*values.shape, 8 * stored.itemsize)
    return np.ascontiguousarray(per_value[:, :, :width]).reshape(len(values), values.shape[1] * width)


def from_bits(bits: np.ndarray, width: int) -> np.ndarray:
    """The inverse: int64 [n, count]."""
    count = bits.shape[1] // width if width else 0
    itemsize = 2 if width <= 16 else 4
    padded = np.zeros((len(bits), count, 8 * itemsize), dtype=np.uint8)
    padded[:, :, :width] = bits.reshape(len(bits), count, width)
    stored = np.packbits(padded.reshape(len(bits), count * 8 * itemsize), axis=1, bitorder="little")
    return stored.view("<u2" if itemsize == 2 else "<u4").astype(np.int64)


def join(fields: Sequence[np.ndarray]) -> np.ndarray:
    """Records uint8 [n, bytes] of fields given as bits [n, bits of the field]."""
    return np.packbits(np.concatenate(fields, axis=1), axis=1, bitorder="little")


def split(records: np.ndarray, sizes: Sequence[int]) -> list[np.ndarray]:
    """The fields' bits again; `sizes` are their bits per record."""
    bits = np.unpackbits(records, axis=1, bitorder="little")
    ends = np.cumsum(sizes)
    return [bits[:, end - size : end] for size, end in zip(sizes, ends, strict=True)]
