"""The endless stream of sequences: passes over the units, each shuffled within windows, from any cursor on.

    pass e:  units in unit_order(seed, e) ► sequences of unit after unit ► windows of W ► window_order(seed, e, window)

Whoever reads the units gives rows back in the order of the tasks, so the stream is the same for one process and for a
cluster.  A cursor holds where its window begins, so that going on reads that window again (W sequences at most, never
the units before it), permutes it in the same way and leaves out what was taken.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from bitdistill_ray.data.blocks import UNIT_END, Block, UnitTask
from bitdistill_ray.data.documents import COUNT_NAMES, Counts
from bitdistill_ray.data.ledger import Cursor
from bitdistill_ray.data.shuffle import unit_order, window_order
from bitdistill_ray.data.sources import CorpusSpec
from bitdistill_ray.data.units import Unit
from bitdistill_ray.errors import DataError

Reader = Callable[[Iterator[UnitTask]], Iterator[Block]]
"""Turns endless tasks into their blocks, in the order of the tasks; `close()` of the iterator ends it."""

logger = logging.getLogger(__name__)

NOTABLE = {
    "cut": "documents longer than max_document_characters are cut",
    "truncated": "pairs longer than a sequence lose their end",
    "dropped": "pairs are left out, since their prompt alone fills a sequence",
}


@dataclass(frozen=True, slots=True)
class Placed:
    """One sequence of the stream, and the cursor after it.

    id `SOURCE#UNIT#INDEX`; ids_T int32, target_T bool, segment_T int32
    """

    id: str
    ids_T: np.ndarray
    target_T: np.ndarray
    segment_T: np.ndarray
    after: Cursor


@dataclass(frozen=True, slots=True)
class _Row:
    """One row of a block, by reference."""

    block: Block
    number: int

    def value(self, column: str) -> int:
        return int(self.block[column][self.number])


class Stream:
    """The stream of one corpus; `counts` sums what the units reported of the pass that `sequences` began in."""

    def __init__(self, corpus: CorpusSpec, units: tuple[Unit, ...], read: Reader) -> None:
        self.corpus, self.units, self._read = corpus, units, read
        self.counts = Counts()
        self._labels = [source.label for source in corpus.sources]

    def sequences(self, cursor: Cursor) -> Iterator[Placed]:
        """All sequences from `cursor` on, pass after pass, without end.

        Raises DataError (an empty corpus, a cursor past its window, what the readers raise) and StorageError.
        """
        start, drop = replace(cursor, taken=0), cursor.taken
        self.counts = Counts()
        window: list[_Row] = []
        for row in self._rows(start):
            if row.value("index") == UNIT_END:
                if row.value("epoch") == cursor.epoch:
                    self._count(row.block["counts"][row.number])
                if row.value("ordinal") + 1 < len(self.units):
                    continue
                following = Cursor(epoch=row.value("epoch") + 1)
                if not window:
                    raise self._empty()
            elif len(window) < self.corpus.window:
                window.append(row)
                continue
            else:
                following = Cursor(epoch=start.epoch, window=start.window + 1, unit=row.value("ordinal"),
                                   skip=row.value("index"))  # fmt: skip
            yield from self._shuffled(window, start, following, drop)
            window = [] if row.value("index") == UNIT_END else [row]
            start, drop = following, 0

    def tasks(self, cursor: Cursor) -> Iterator[UnitTask]:
        """The units to read from the start of a cursor's window on, without end."""
        epoch, unit, skip = cursor.epoch, cursor.unit, cursor.skip
        while True:
            order = unit_order(len(self.units), seed=self.corpus.seed, epoch=epoch)
            for ordinal in range(unit, len(self.units)):
                yield UnitTask(epoch=epoch, ordinal=ordinal, skip=skip, unit=self.units[order[ordinal]])
                skip = 0
            epoch, unit = epoch + 1, 0

    def _rows(self, cursor: Cursor) -> Iterator[_Row]:
        for block in self._read(self.tasks(cursor)):
            for number in range(len(block["index"])):
                yield _Row(block, number)

    def _shuffled(self, window: list[_Row], start: Cursor, following: Cursor, drop: int) -> Iterator[Placed]:
        if drop >= len(window):
            raise DataError("data ledger", f"{drop} sequences taken from a window of {len(window)}",
                            "Resume from an earlier checkpoint")  # fmt: skip
        order = window_order(len(window), seed=self.corpus.seed, epoch=start.epoch, window=start.window)
        units = unit_order(len(self.units), seed=self.corpus.seed, epoch=start.epoch)
        for taken, place in enumerate(order.tolist()[drop:], start=drop + 1):
            row = window[place]
            unit = self.units[units[row.value("ordinal")]]
            ids_T, target_T, segment_T = (row.block[column][row.number] for column in ("ids", "target", "segment"))
            yield Placed(
                id=f"{self._labels[unit.source]}#{unit.name}#{row.value('index')}",
                ids_T=ids_T,
                target_T=target_T,
                segment_T=segment_T,
                after=following if taken == len(window) else replace(start, taken=taken),
            )

    def _count(self, counts: np.ndarray) -> None:
        for name, value in zip(COUNT_NAMES, counts.tolist(), strict=True):
            if value and name in NOTABLE and getattr(self.counts, name) == 0:
                logger.warning("%s: %d so far", NOTABLE[name], value)
        self.counts.add(counts)

    def _empty(self) -> DataError:
        paths = ", ".join(source.path for source in self.corpus.sources)
        return DataError(paths, f"an empty corpus: {len(self.units)} units without a usable document "
                         f"({self.counts.empty} empty, {self.counts.dropped} dropped)",
                         "Check the path and the column, or raise sequence_length")  # fmt: skip
