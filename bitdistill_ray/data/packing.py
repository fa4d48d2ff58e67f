"""Runs of tokens to sequences of a fixed length: pure, streaming, and the same whatever cut the runs came in.

Documents follow each other until a sequence is full; what is left of a document opens the next sequence.  Segments
number the documents within a sequence, so that attention and positions can stop at their borders, and the first token
of a segment is never a target, since nothing that it could be predicted from is in its sequence.  An example that is to
stay whole opens a new sequence where it no longer fits.  The tail of the last sequence is padding.

Shape suffix here: T tokens of a sequence, R tokens of a run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

PADDING = -1  # segment number


@dataclass(frozen=True, slots=True)
class Run:
    """Tokens of one document, or a part of them.

    ids_R     int32
    target_R  bool: to be predicted
    opens     whether a document begins here (False: it goes on from the run before)
    whole     must stay in one sequence; at most T tokens, and a whole document
    """

    ids_R: np.ndarray
    target_R: np.ndarray
    opens: bool = True
    whole: bool = False


@dataclass(frozen=True, slots=True)
class PackedSequence:
    """T tokens: int32 ids, bool targets, int32 segments (PADDING where there is no document)."""

    ids_T: np.ndarray
    target_T: np.ndarray
    segment_T: np.ndarray


def pack(runs: Iterable[Run], length: int, *, pad_id: int) -> Iterator[PackedSequence]:
    """Pack runs, in their order, into sequences of `length` tokens; each is given out as soon as it is full."""
    page = _Page(length, pad_id)
    for run in runs:
        if run.whole and page.used + len(run.ids_R) > length:
            yield from page.turn()
        start = 0
        while start < len(run.ids_R):
            start = page.write(run, start)
            if page.used == length:
                yield from page.turn()
    yield from page.turn()


class _Page:
    """The sequence that is being filled."""

    def __init__(self, length: int, pad_id: int) -> None:
        self.length, self.pad_id = length, pad_id
        self._clear()

    def _clear(self) -> None:
        self.used, self.segment = 0, PADDING
        self.ids_T = np.full(self.length, self.pad_id, dtype=np.int32)
        self.target_T = np.zeros(self.length, dtype=np.bool_)
        self.segment_T = np.full(self.length, PADDING, dtype=np.int32)

    def write(self, run: Run, start: int) -> int:
        """Copy as much of `run` from `start` as fits; returns where to go on."""
        end = min(start + self.length - self.used, len(run.ids_R))
        place = slice(self.used, self.used + end - start)
        begins = self.used == 0 or (run.opens and start == 0)
        self.segment += begins
        self.ids_T[place] = run.ids_R[start:end]
        self.target_T[place] = run.target_R[start:end]
        self.segment_T[place] = self.segment
        if begins:
            self.target_T[self.used] = False
        self.used = place.stop
        return end

    def turn(self) -> Iterator[PackedSequence]:
        """Give out the sequence, if anything is in it, and begin another."""
        if self.used:
            yield PackedSequence(self.ids_T, self.target_T, self.segment_T)
            self._clear()
