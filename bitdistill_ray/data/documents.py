"""Units to documents: empty ones skipped, gigantic ones cut for the memory's sake; each case counted.

A document comes as pieces of at most `max_document_characters`, which are tokenised one by one and then joined: no end
token stands between the pieces of one document, so nothing of it is lost or torn apart.  A cut is made before white
space where there is some near, since few tokenizers join text across it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields

import numpy as np

from bitdistill_ray.data.readers import Record, read_arrow, read_jsonl, read_parquet, read_text
from bitdistill_ray.data.sources import CorpusSpec, FileFormat
from bitdistill_ray.data.units import Unit, compression, file_format

CUT_SEARCH = 4096  # characters before the limit in which white space is looked for
MAX_BYTES_PER_CHARACTER = 12  # of a JSON string: a character outside the BMP as two \uXXXX escapes
LINE_OVERHEAD = 16 << 20  # bytes of a JSONL line that may belong to other keys


@dataclass(slots=True)
class Counts:
    """What happened to documents on their way into sequences."""

    documents: int = 0
    """Documents or pairs that were used."""
    empty: int = 0
    """Skipped: null, or white space only."""
    cut: int = 0
    """Longer than max_document_characters: tokenised in pieces (of a pair, the rest is lost)."""
    truncated: int = 0
    """Supervised pairs longer than a sequence: their end is lost."""
    dropped: int = 0
    """Supervised pairs whose prompt alone fills a sequence: nothing left to learn."""

    def to_array(self) -> np.ndarray:
        """int64 [len(COUNT_NAMES)], in the order of COUNT_NAMES."""
        return np.array([getattr(self, name) for name in COUNT_NAMES], dtype=np.int64)

    def add(self, array: np.ndarray) -> None:
        """Add what `to_array` made."""
        for name, value in zip(COUNT_NAMES, array.tolist(), strict=True):
            setattr(self, name, getattr(self, name) + value)


COUNT_NAMES = tuple(field.name for field in fields(Counts))


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of a plain document, or all of it; `last` ends the document."""

    text: str
    last: bool


@dataclass(frozen=True, slots=True)
class Pair:
    """One supervised example."""

    prompt: str
    response: str


def read_documents(unit: Unit, corpus: CorpusSpec, counts: Counts) -> Iterator[Piece | Pair]:
    """The documents of a unit in the file's order; `counts` is updated on the way.

    Raises DataError and StorageError as the readers do.
    """
    source = corpus.sources[unit.source]
    storage = source.storage(unit.url)
    limit = corpus.max_document_characters
    kind = file_format(unit.url)
    if kind is FileFormat.TEXT:
        yield from document_pieces(read_text(storage, compression(unit.url)), limit, counts)
        return
    records: Iterator[Record]
    labels = source.template is not None
    if kind is FileFormat.PARQUET:
        records = read_parquet(storage, source.columns, unit.row_group, labels=labels)
    elif kind is FileFormat.ARROW:
        records = read_arrow(storage, source.columns, labels=labels)
    else:
        max_line = limit * MAX_BYTES_PER_CHARACTER + LINE_OVERHEAD
        records = read_jsonl(storage, compression(unit.url), source.columns, max_line, labels=labels)
    for record in records:
        if source.template is not None:
            row = dict(zip(source.columns, record, strict=True))
            made = source.template.prompt(row, unit.url), source.template.answer(row, unit.url)
            yield from _pair(made, limit, counts)
        elif source.is_supervised:
            yield from _pair(record, limit, counts)
        else:
            yield from document_pieces(_slices(record[0] or "", limit), limit, counts)


def _pair(record: Record, limit: int, counts: Counts) -> Iterator[Pair]:
    prompt, response = (text or "" for text in record)
    if not response.strip():
        counts.empty += 1
        return
    counts.documents += 1
    counts.cut += len(prompt) > limit or len(response) > limit
    yield Pair(prompt[:limit], response[:limit])


def _slices(text: str, size: int) -> Iterator[str]:
    return (text[start : start + size] for start in range(0, len(text), size))


def document_pieces(chunks: Iterable[str], limit: int, counts: Counts) -> Iterator[Piece]:
    """One document, given as chunks of text, as pieces of at most `limit` characters."""
    held, pieces = "", 0
    for chunk in chunks:
        held += chunk
        while len(held) > limit:
            end = _cut_point(held, limit)
            yield Piece(held[:end], last=False)
            held, pieces = held[end:], pieces + 1
    if pieces == 0 and not held.strip():
        counts.empty += 1
        return
    counts.documents += 1
    counts.cut += pieces > 0
    yield Piece(held, last=True)


def _cut_point(text: str, limit: int) -> int:
    """Where to cut `text` to at most `limit` characters: before the last line end or space near it, or right there."""
    start = max(1, limit - CUT_SEARCH)
    found = max(text.rfind("\n", start, limit), text.rfind(" ", start, limit))
    return found if found > 0 else limit
