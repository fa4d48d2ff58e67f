"""One sequence's part of a teacher's answer, as the named arrays that a block stores.

A Message (teacher/wire.py) answers a batch; the cache keeps sequences, since another epoch or job packs them into other
batches.  Every array of a message has the sequences in front, so a part is a row of each.  The two of a top-k answer
become one array of records (topk.py); hidden states, logits, sampled tokens, Q, K and V stay as they are on the wire.

A key is the digest of what the answer is about: the ids of one sequence and where its documents begin.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from bitdistill_ray.cache.topk import TopKCoder
from bitdistill_ray.data.batch import BatchArrays
from bitdistill_ray.teacher.wire import Message

Entry = dict[str, np.ndarray]
RECORDS = "topk_records"
LAYERS = ("attention_layer", "states_layers")  # numbers beside the arrays
_TOPK = ("topk_ids", "topk_logprobs")
_ABOUT = ("sequence_ids", "digest", *LAYERS)  # of a message, what is no array


def keys_of(arrays: BatchArrays) -> list[str]:
    """The key of every sequence of a batch: equal for equal ids and document boundaries, whatever the batch."""
    rows = zip(arrays["ids"].astype("<i4"), arrays["segment"].astype("<i4"), strict=True)
    return [hashlib.sha256(ids_T.tobytes() + segment_T.tobytes()).hexdigest()[:32] for ids_T, segment_T in rows]


def entries_of(message: Message, coder: TopKCoder | None) -> list[Entry]:
    """An answer, sequence by sequence.  `coder` is needed where there are top-k answers."""
    arrays = {name: value for name, value in message.items() if name not in _ABOUT}
    if coder is not None:
        ids_BTS, logprobs_BTS = (arrays.pop(name) for name in _TOPK)
        records = coder.encode(_flat(ids_BTS), _flat(logprobs_BTS))
        arrays[RECORDS] = records.reshape(*ids_BTS.shape[:2], coder.token_bytes)
    extra = {name: np.array(message[name]) for name in LAYERS if name in message}
    return [{**{name: array[row] for name, array in arrays.items()}, **extra}
            for row in range(len(message["sequence_ids"]))]  # fmt: skip


def message_of(entries: Sequence[Entry], coder: TopKCoder | None, sequence_ids: tuple[str, ...]) -> Message:
    """The answer to a batch again; the inverse of `entries_of` but for the digest."""
    message: dict[str, Any] = {
        name: np.stack([entry[name] for entry in entries]) for name in entries[0] if name not in (RECORDS, *LAYERS)
    }
    if coder is not None:
        records = np.stack([entry[RECORDS] for entry in entries])
        ids_nS, logprobs_nS = coder.decode(_flat(records))
        for name, values_nS in zip(_TOPK, (ids_nS, logprobs_nS), strict=True):
            message[name] = values_nS.reshape(*records.shape[:2], coder.entries)
    for name in LAYERS:
        if name in entries[0]:
            message[name] = entries[0][name].tolist()
    return {**message, "sequence_ids": sequence_ids}


def _flat(array_BTx: np.ndarray) -> np.ndarray:
    return array_BTx.reshape(-1, array_BTx.shape[-1])
