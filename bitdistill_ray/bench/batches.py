"""Random token sequences, as a feeder hands them out."""

from __future__ import annotations

import torch

from bitdistill_ray.core import TokenBatch
from bitdistill_ray.data.batch import BatchArrays
from bitdistill_ray.teacher.wire import encode_batch


def random_arrays(sequences: int, tokens: int, vocabulary: int, *, seed: int = 0) -> BatchArrays:
    """`sequences` rows of one document of `tokens` random tokens each."""
    ids_BT = torch.randint(vocabulary, (sequences, tokens), generator=torch.Generator().manual_seed(seed))
    return encode_batch(
        TokenBatch(
            ids_BT=ids_BT,
            target_BT=torch.ones_like(ids_BT, dtype=torch.bool),
            segment_BT=torch.zeros_like(ids_BT, dtype=torch.int32),
            sequence_ids=tuple(f"random#{seed}#{row}" for row in range(sequences)),
        )
    )


class RandomFeeder:
    """Answers as `data.feeder.Feeder` does, with random tokens: the same ones whenever a step is asked for."""

    def __init__(self, sequences_per_step: int, tokens: int, vocabulary: int) -> None:
        self.sequences_per_step, self.tokens, self.vocabulary = sequences_per_step, tokens, vocabulary

    def batch(self, step: int, *, rank: int = 0, ranks: int = 1, micro: int = 0, micros: int = 1) -> BatchArrays:
        """The share of one micro-batch of one rank."""
        sequences = self.sequences_per_step // (ranks * micros)
        return random_arrays(sequences, self.tokens, self.vocabulary, seed=(step * ranks + rank) * micros + micro)

    def sequences(self, step: int) -> dict[str, int]:
        """What a row of metrics says of the step's sequences."""
        return {"sequences": (step + 1) * self.sequences_per_step}
