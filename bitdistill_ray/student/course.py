"""What changes from step to step besides the learning rate: how much of the quantisation a student sees, and the weight
of its attention relations (`balance.py`).

With `quant_warmup_steps` N, weights and activations are w + strength * (Q(w) - w) in step s, strength = min(1, s / N).
The strength is one scalar on the device that every quantised linear reads, and follows from the step's number alone: a
resumed run has that of one that was left alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bitdistill_ray.core import TeacherSignals, TokenBatch
from bitdistill_ray.loss_config import AdaptiveWeight
from bitdistill_ray.losses.reduction import Totals
from bitdistill_ray.model.linear import soften
from bitdistill_ray.stage_config import StudentStage, TrainStage
from bitdistill_ray.student.balance import Balance
from bitdistill_ray.student.module import LossModule

STRENGTH = "quant_strength"  # in a step's row


class Course:
    """`begin` every step, `micro` before each of its passes, `figures` after them; all ranks together."""

    def __init__(self, module: LossModule, stage: TrainStage, *, ranks: int, device: torch.device) -> None:
        self.warmup, self.strength, self.balance = 0, torch.ones((), device=device), None
        if isinstance(stage, StudentStage):
            self.warmup, relation = stage.quant_warmup_steps, stage.loss.relation
            if relation is not None and isinstance(relation.weight, AdaptiveWeight):
                self.balance = Balance(module, relation.weight, ranks=ranks, device=device)
        if self.warmup:
            soften(module.model, self.strength)

    def begin(self, step: int) -> None:
        """Step `step`, from 0, is about to begin."""
        if self.warmup:
            self.strength.fill_(min(1.0, step / self.warmup))
        if self.balance:
            self.balance.begin(step)

    def micro(self, batch: TokenBatch, signals: TeacherSignals | None, totals: Totals) -> None:
        """A micro-batch on the device, before the pass that trains."""
        if self.balance:
            self.balance.micro(batch, signals, totals)

    def figures(self) -> dict[str, Tensor]:
        """What the step had, for its row: scalars on the device."""
        strength = {STRENGTH: self.strength} if self.warmup else {}
        return strength | (self.balance.figures() if self.balance else {})

    def state(self) -> dict[str, Any]:
        """For a checkpoint: what does not follow from a step's number."""
        return {"relation_weight": self.balance.state()} if self.balance else {}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        if self.balance and "relation_weight" in state:
            self.balance.load(state["relation_weight"])
