"""A mixture of streams: which stream each sequence of the global order comes from, and the streams side by side.

Weighted sources are a stream each, with a cursor and a count of passes of their own: a small source begins again while
a large one has not ended.  Sequence n of the global order comes from the stream in whose share of [0, 1) the point

    u_n = frac(u_0 + n / golden ratio)                      in 64-bit integers; u_0 from the seed

falls.  This is a pure function of n, so that a position says everything, and it is even: after any number of sequences
a stream has had its share to within a few of them, where independent draws would stray by the square root.  Shares are
counted in sequences, which all have the same length: in tokens too, up to padding.

Sources without weights are one stream together, all their units shuffled as one.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import accumulate

from bitdistill_ray.data.ledger import Cursor
from bitdistill_ray.data.sources import CorpusSpec
from bitdistill_ray.data.stream import Placed, Stream
from bitdistill_ray.data.units import Unit

STREAM = "corpus"  # the one stream of sources without weights
GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, odd
ONE = 1 << 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One stream of a corpus: its name in the ledger, the corpus it is alone, its units, and its share of the whole."""

    name: str
    corpus: CorpusSpec
    units: tuple[Unit, ...]
    share: Fraction


def parts_of(corpus: CorpusSpec, units: Sequence[Unit]) -> tuple[Part, ...]:
    """The streams of a corpus: one of all sources, or one per source where they have weights."""
    if not corpus.is_weighted:
        return (Part(name=STREAM, corpus=corpus, units=tuple(units), share=Fraction(1)),)
    return tuple(
        Part(
            name=source.label,
            corpus=replace(corpus, sources=(source,)),
            units=tuple(replace(unit, source=0) for unit in units if unit.source == index),
            share=share,
        )
        for index, (source, share) in enumerate(zip(corpus.sources, corpus.shares, strict=True))
    )


class Draw:
    """Which of the shares sequence `position` falls to: a pure function of both and the seed."""

    def __init__(self, shares: Sequence[Fraction], seed: int) -> None:
        self._ends = [int(end * ONE) for end in accumulate(shares)]
        self._start = int.from_bytes(hashlib.sha256(f"mixture/{seed}".encode()).digest()[:8], "little")

    def __call__(self, position: int) -> int:
        """The index of the share."""
        return bisect.bisect_right(self._ends, (self._start + position * GOLDEN) % ONE)


class Mixture:
    """The global order of the sequences of some streams, by name, with these shares (which sum to 1)."""

    def __init__(self, streams: Mapping[str, Stream], shares: Sequence[Fraction], *, seed: int) -> None:
        self.streams = dict(streams)
        self._draw = Draw(shares, seed)

    def sequences(self, position: int, cursors: Mapping[str, Cursor]) -> Generator[tuple[str, Placed], None, None]:
        """(stream, sequence) from `position` of the global order on, without end; a missing cursor is the start.

        Raises what `Stream.sequences` raises.
        """
        names = list(self.streams)
        flows = [self.streams[name].sequences(cursors.get(name, Cursor())) for name in names]
        while True:
            drawn = self._draw(position)
            yield names[drawn], next(flows[drawn])
            position += 1
