"""Which checkpoints are kept: the newest ones, and those with the lowest training loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Saved:
    """One good checkpoint.

    folder  its name in the stage's folder of checkpoints
    step    optimiser steps done
    ranks   workers that saved a part
    zero    ZeRO stage
    loss    mean training loss of the steps since the checkpoint before; None where it is not known
    long    whether it holds two long parameters in place of the model's own (`layout.py`)
    """

    folder: str
    step: int
    ranks: int
    zero: int
    loss: float | None = None
    long: bool = False


def kept(saved: Sequence[Saved], *, last: int, best: int) -> list[Saved]:
    """Those of `saved` that stay, oldest first: the `last` newest and the `best` with the lowest loss."""
    by_step = sorted(saved, key=lambda s: s.step)
    by_loss = sorted((s for s in by_step if s.loss is not None), key=lambda s: (s.loss, -s.step))
    stays = {s.folder for s in by_step[len(by_step) - min(last, len(by_step)) :]} | {s.folder for s in by_loss[:best]}
    return [s for s in by_step if s.folder in stays]
