"""The two sides of `bitdistill bench data`, each run in a process of its own, pinned to one core where that can be.

Nothing heavy is imported here: what is measured is the data path, not torch.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bitdistill_ray.data.dataset import read_here
from bitdistill_ray.data.documents import Counts, Piece, read_documents
from bitdistill_ray.data.encoder import Encoder
from bitdistill_ray.data.ledger import Cursor
from bitdistill_ray.data.runs import BATCH_DOCUMENTS
from bitdistill_ray.data.sources import CorpusSpec
from bitdistill_ray.data.stream import Stream
from bitdistill_ray.data.units import list_units
from bitdistill_ray.errors import DataError

ROUNDS = 5
WORDS = (20, 1500)  # of a document
SENTENCE = (4, 24)


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Median tokens per second of CPU time of one core."""

    stream: float
    tokenizer: float


def made_up(words: list[str], seed: int) -> Iterator[str]:
    """Documents without end: words drawn as often as they stand in `words`, with numbers among them."""
    draw = random.Random(seed)
    while True:
        left, sentences = draw.randint(*WORDS), []
        while left > 0:
            drawn = draw.choices(words, k=min(left, draw.randint(*SENTENCE)))
            if draw.random() < 0.3:
                drawn.append(str(draw.randrange(10_000)))
            sentences.append(" ".join(drawn).capitalize() + draw.choice([".", ".", ".", "?", "!\n"]))
            left -= len(drawn)
        yield " ".join(sentences)


def documents_of(corpus: CorpusSpec) -> Iterator[str]:
    """The plain documents of a corpus, one pass after the other."""
    units = list_units(corpus)
    while True:
        found = False
        for unit in units:
            for piece in read_documents(unit, corpus, Counts()):
                if isinstance(piece, Piece):
                    found = True
                    yield piece.text
        if not found:
            raise DataError(corpus.sources[0].path, "no plain document in it", "Name another path or column")


def speed(corpus: CorpusSpec) -> Speed:
    """The whole stream of a corpus, and its tokenizer alone on the same text, in turn on one core."""
    pin()
    encoder = corpus.encoder()
    texts = [text for unit in list_units(corpus) for text in _texts(read_documents(unit, corpus, Counts()))]
    sides: dict[str, Callable[[], int]] = {
        "stream": lambda: one_pass(corpus, encoder),
        "tokenizer": lambda: tokenize(texts, encoder),
    }
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(ROUNDS + 1):
        for name, side in sides.items():
            began = time.process_time()
            tokens = side()
            if number:  # the first round warms up
                rates[name].append(tokens / (time.process_time() - began))
    return Speed(**{name: median(of) for name, of in rates.items()})


def peak_mib(corpus: CorpusSpec) -> float:
    """Resident memory of this process at its highest, MiB, after one pass of the stream."""
    pin()
    one_pass(corpus, corpus.encoder())
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise DataError("/proc/self/status", "does not tell the peak of memory", "Measure on Linux")


def pin() -> None:
    """Keep this process on one core, so that the tokenizer's threads are one."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def _texts(pieces: Iterator[object]) -> list[str]:
    return [piece.text for piece in pieces if isinstance(piece, Piece)]


def tokenize(texts: list[str], encoder: Encoder) -> int:
    """Tokens of some texts, in batches as the stream makes them."""
    backend = encoder.backend
    tokens = 0
    for start in range(0, len(texts), BATCH_DOCUMENTS):
        encoded = backend.encode_batch_fast(texts[start : start + BATCH_DOCUMENTS], add_special_tokens=False)
        tokens += sum(map(len, encoded))
    return tokens


def one_pass(corpus: CorpusSpec, encoder: Encoder) -> int:
    """Tokens of one pass of the stream, end tokens among them."""
    stream = Stream(corpus, list_units(corpus), lambda tasks: read_here(tasks, corpus, encoder))
    tokens = 0
    for sequence in stream.sequences(Cursor()):
        tokens += int((sequence.segment_T >= 0).sum())
        if sequence.after.epoch:
            return tokens
    raise AssertionError("a stream has no end")
