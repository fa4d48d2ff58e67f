"""Perplexity, KL and agreement on held-out texts while a student learns: the curves that a loss cannot show.

The texts are cut into windows of a training sequence's length, of which every rank measures its share, in micro-batches
of the training's own shape.  The teacher is asked once, before the first step; its hidden states stay on the host.

    W windows   T tokens of one
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from bitdistill_ray.core import TokenBatch
from bitdistill_ray.data.batch import BatchArrays, token_batch
from bitdistill_ray.errors import DataError
from bitdistill_ray.losses.quality import quality_sums
from bitdistill_ray.losses.teacher_view import Head
from bitdistill_ray.model.forward import hidden_states
from bitdistill_ray.model.heads import LMHead
from bitdistill_ray.student.module import LossModule
from bitdistill_ray.teacher import wire
from bitdistill_ray.teacher.request import SignalRequest
from bitdistill_ray.teacher.roster import Roster

PADDING = "padding"  # sequence id of a window that only fills a micro-batch
Windows = Mapping[str, np.ndarray]
"""int32 [W, T] token ids by the text's name."""


@dataclass(frozen=True, slots=True)
class AskedTeacher:
    """Where the teachers are, and their frozen head on the student's device."""

    roster: Roster
    head: Head
    timeout_s: float


class QualityProbe:
    """`look` measures all texts; every rank calls it together."""

    def __init__(
        self, module: LossModule, windows: Windows, *, rank: int, ranks: int, micro_batch: int, device: torch.device
    ) -> None:
        self.model, self.ranks, self.device = module.model, ranks, device
        self.batches = {name: list(shared(name, ids, rank, ranks, micro_batch)) for name, ids in windows.items()}
        self.teacher: AskedTeacher | None = None
        self.answers: dict[str, list[Tensor]] = {}

    def ask(self, teacher: AskedTeacher) -> None:
        """Have the teachers say what they make of this rank's windows."""
        self.teacher = teacher
        for name, batches in self.batches.items():
            said = [teacher.roster.call("score", arrays, SignalRequest(), timeout_s=teacher.timeout_s)
                    for arrays in batches]  # fmt: skip
            for message, arrays in zip(said, batches, strict=True):
                wire.check_answer(message, arrays)
            self.answers[name] = [wire.get(message, "hidden") for message in said]

    @torch.no_grad()
    def look(self) -> dict[str, float]:
        """`ppl:NAME`, and with a teacher `kl:NAME` and `agreement:NAME`, of every text."""
        sums = torch.stack([self._sums(name) for name in self.batches])
        if self.ranks > 1:
            dist.all_reduce(sums)
        means = sums[:, :3] / sums[:, 3:]
        means[:, 0].exp_()
        found: dict[str, float] = {}
        for name, (ppl, kl, same) in zip(self.batches, means.tolist(), strict=True):
            found |= {f"ppl:{name}": ppl}
            if self.teacher is not None:
                found |= {f"kl:{name}": kl, f"agreement:{name}": same}
        return found

    def _sums(self, name: str) -> Tensor:
        """float64 [4]: `quality_sums` over this rank's windows, and their tokens."""
        total = torch.zeros(4, dtype=torch.float64, device=self.device)
        student_head, teacher = LMHead(self.model), self.teacher
        for number, arrays in enumerate(self.batches[name]):
            batch: TokenBatch = token_batch(arrays).to(self.device)
            student_BTD = hidden_states(self.model, batch)
            teacher_BTD = None if teacher is None else self.answers[name][number].to(self.device)
            for row, id_ in enumerate(batch.sequence_ids):
                sums = quality_sums(
                    student_head,
                    student_BTD[row, :-1],
                    batch.ids_BT[row, 1:],
                    None if teacher is None else teacher.head,
                    None if teacher_BTD is None else teacher_BTD[row, :-1],
                )
                if id_ != PADDING:  # under ZeRO-3 every rank runs the head as often as the others
                    total[:3] += sums
                    total[3] += batch.ids_BT.shape[1] - 1
        return total


def cut(name: str, ids: np.ndarray, length: int) -> np.ndarray:
    """int32 [W, T]: whole windows of `length` tokens.

    Raises:
        DataError: not even one.
    """
    if len(ids) < length:
        raise DataError(f"monitor.quality_texts: {name}", f"{len(ids)} tokens, a window has {length}",
                        "Give a longer text, raise monitor.quality_tokens, or lower data.sequence_length")  # fmt: skip
    return ids[: len(ids) // length * length].reshape(-1, length).astype(np.int32)


def shared(name: str, ids_WT: np.ndarray, rank: int, ranks: int, micro_batch: int) -> Iterator[BatchArrays]:
    """The micro-batches of one rank: every `ranks`-th window, and padding, so that all ranks have as many."""
    own = list(range(rank, len(ids_WT), ranks))
    largest = -(-len(ids_WT) // ranks)
    places = [*own, *[-1] * (-(-largest // micro_batch) * micro_batch - len(own))]
    for first in range(0, len(places), micro_batch):
        chosen = places[first : first + micro_batch]
        ids = ids_WT[[max(0, place) for place in chosen]]
        yield {
            "ids": ids,
            "target": np.ones(ids.shape, dtype=np.bool_),
            "segment": np.zeros(ids.shape, dtype=np.int32),
            "sequence_ids": np.array([PADDING if p < 0 else f"{name}#0#{p}" for p in chosen], dtype=np.str_),
        }
