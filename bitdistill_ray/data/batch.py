"""Batches on the wire: numpy arrays between the feeder and a rank, TokenBatch on the rank.

ids int32 [n, T]   target bool [n, T]   segment int32 [n, T]   sequence_ids str [n]
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bitdistill_ray.core import TokenBatch
from bitdistill_ray.data.stream import Placed

BatchArrays = dict[str, np.ndarray]


def stack(sequences: Sequence[Placed]) -> BatchArrays:
    """The arrays of some sequences, in their order."""
    return {
        "ids": np.stack([sequence.ids_T for sequence in sequences]),
        "target": np.stack([sequence.target_T for sequence in sequences]),
        "segment": np.stack([sequence.segment_T for sequence in sequences]),
        "sequence_ids": np.array([sequence.id for sequence in sequences], dtype=np.str_),
    }


def share(arrays: BatchArrays, part: int, parts: int) -> BatchArrays:
    """The `part`-th of `parts` equal, contiguous shares of the rows."""
    size = len(arrays["ids"]) // parts
    return {name: array[part * size : (part + 1) * size] for name, array in arrays.items()}


def token_batch(arrays: BatchArrays) -> TokenBatch:
    """The TokenBatch of arrays (which may be read-only: tensors are copies of their own)."""
    import torch

    return TokenBatch(
        ids_BT=torch.from_numpy(arrays["ids"].astype(np.int64)),
        target_BT=torch.from_numpy(arrays["target"].copy()),
        segment_BT=torch.from_numpy(arrays["segment"].copy()),
        sequence_ids=tuple(arrays["sequence_ids"].tolist()),
    )
