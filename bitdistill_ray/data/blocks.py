"""Blocks: how packed sequences travel from the workers, as plain numpy arrays in the object store.

One row is one sequence.  The last row of every unit holds no sequence (index UNIT_END): it says that the unit is
finished, and what was counted in it.

    epoch, ordinal  int64 [n]      which pass, and which unit of that pass's order
    index           int64 [n]      the sequence's number within its unit, from 0; UNIT_END in a unit's last row
    ids             int32 [n, T]   target  bool [n, T]   segment  int32 [n, T]
    counts          int64 [n, c]   in a unit's last row the unit's `Counts`; else 0
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from bitdistill_ray.data.documents import Counts, read_documents
from bitdistill_ray.data.encoder import Encoder
from bitdistill_ray.data.packing import PADDING, PackedSequence, pack
from bitdistill_ray.data.runs import encode_documents
from bitdistill_ray.data.sources import CorpusSpec
from bitdistill_ray.data.units import Unit
from bitdistill_ray.errors import StorageError
from bitdistill_ray.storage_retry import Patience

Block = dict[str, np.ndarray]

UNIT_END = -1
BLOCK_BYTES = 4 << 20
BYTES_PER_TOKEN = 9  # ids, target, segment


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitTask:
    """Read one unit, as the `ordinal`-th of pass `epoch`, and leave out its first `skip` sequences."""

    epoch: int
    ordinal: int
    skip: int
    unit: Unit


def read_unit(task: UnitTask, corpus: CorpusSpec, encoder: Encoder) -> Iterator[Block]:
    """Read, tokenise and pack one unit: a pure function of its arguments and the file.

    Blocks hold about BLOCK_BYTES; one of them and one batch of documents is all that is in memory.
    Raises DataError and StorageError.
    """
    counts = Counts()
    documents = read_documents(task.unit, corpus, counts)
    runs = encode_documents(documents, encoder, corpus, counts)
    rows = max(1, BLOCK_BYTES // (BYTES_PER_TOKEN * corpus.sequence_length))
    held: list[PackedSequence] = []
    index = -1
    for index, sequence in enumerate(pack(runs, corpus.sequence_length, pad_id=encoder.end_id)):
        if index < task.skip:
            continue
        held.append(sequence)
        if len(held) == rows:
            yield _block(task, held, index + 1 - rows)
            held = []
    block = _block(task, [*held, _no_sequence(corpus.sequence_length)], index + 1 - len(held))
    block["index"][-1] = UNIT_END
    block["counts"][-1] = counts.to_array()
    yield block


def read_unit_patiently(task: UnitTask, corpus: CorpusSpec, encoder: Encoder) -> Iterator[Block]:
    """`read_unit`; where the store fails for a while, the unit is read again and goes on after the last block."""
    patience_s = corpus.sources[task.unit.source].patience_s
    patience = Patience(patience_s)
    while True:
        try:
            for block in read_unit(task, corpus, encoder):
                yield block
                task, patience = replace(task, skip=int(block["index"][-1]) + 1), Patience(patience_s)
        except StorageError as error:
            if not patience.bears(error, task.unit.url):
                raise
        else:
            return


def _no_sequence(length: int) -> PackedSequence:
    segment_T = np.full(length, PADDING, dtype=np.int32)
    return PackedSequence(np.zeros(length, dtype=np.int32), np.zeros(length, dtype=np.bool_), segment_T)


def _block(task: UnitTask, sequences: list[PackedSequence], first: int) -> Block:
    rows = len(sequences)
    return {
        "epoch": np.full(rows, task.epoch, dtype=np.int64),
        "ordinal": np.full(rows, task.ordinal, dtype=np.int64),
        "index": np.arange(first, first + rows, dtype=np.int64),
        "ids": np.stack([sequence.ids_T for sequence in sequences]),
        "target": np.stack([sequence.target_T for sequence in sequences]),
        "segment": np.stack([sequence.segment_T for sequence in sequences]),
        "counts": np.zeros((rows, len(Counts().to_array())), dtype=np.int64),
    }
