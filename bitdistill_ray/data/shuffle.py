"""Shuffling without randomness: orders that are pure functions of a seed and a place.

Every pass reads the units in an order of its own, and then permutes the sequences within windows: a large window mixes
several units, and costs its size in memory.  Orders come from SHAKE-256 rather than from a generator of numpy, whose
streams may change between versions; a run must be resumable on another machine.
"""

from __future__ import annotations

import hashlib

import numpy as np


def permutation(count: int, *key: int | str) -> np.ndarray:
    """A permutation of `range(count)`, int64, decided by `key` alone.

    Sorts by 64-bit draws of SHAKE-256, one hash of the key for all.  Ties (2^-64 a pair)
    keep their order.
    """
    text = "/".join(map(str, key)).encode()
    draws = np.frombuffer(hashlib.shake_256(text).digest(8 * count), dtype="<u8")
    return np.argsort(draws, kind="stable").astype(np.int64)


def unit_order(units: int, *, seed: int, epoch: int) -> np.ndarray:
    """The order in which pass `epoch` reads the units."""
    return permutation(units, "units", seed, epoch)


def window_order(size: int, *, seed: int, epoch: int, window: int) -> np.ndarray:
    """The order of the sequences within a window (the last window of a pass is smaller)."""
    return permutation(size, "window", seed, epoch, window)
