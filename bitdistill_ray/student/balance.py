"""The weight of the attention relations, set by gradients: `loss.relation.weight=adaptive`.

What a weight means depends on the model, the task and the convention of the relations; how large a gradient it makes
beside the others does not.  In the first step and in every so-manieth after it,

    wanted = ratio * |gradient of the other terms| / |gradient of the relations|       norms over all trained weights
    weight = weight^smoothing * wanted^(1 - smoothing)                                  the first time: wanted

Norms are of the first micro-batch of each worker, averaged over the workers.  The weight lives on the device and is
changed in place: nobody waits for it, a recorded pass reads it where it is, and what was found reaches the step's row
with the other figures.  Steps are counted from the stage's start and the weight travels in checkpoints, so a resumed
run has the weights of one that was left alone.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from bitdistill_ray.core import TeacherSignals, TokenBatch
from bitdistill_ray.loss_config import AdaptiveWeight
from bitdistill_ray.losses.chunked import RELATION
from bitdistill_ray.losses.objective import Objective, TermKind
from bitdistill_ray.losses.reduction import Totals
from bitdistill_ray.student.module import LossModule
from bitdistill_ray.student.term_gradients import gradient_norms

OTHERS = "others"
WEIGHT, RATIO = "relation_weight", "grad_norm_relation_ratio"  # in a step's row


class Balance:
    """`begin` every step, `micro` before each of its passes, `figures` after them; all ranks together."""

    def __init__(self, module: LossModule, config: AdaptiveWeight, *, ranks: int, device: torch.device) -> None:
        self.module, self.config, self.ranks = module, config, ranks
        self.weight = torch.zeros((), device=device)  # 0: not measured yet
        module.relation_weight = self.weight
        self.parts = parts_of(module.objective, config)
        self.due = False
        self.ratio: Tensor | None = None

    def begin(self, step: int) -> None:
        """Step `step`, from 0, is about to begin."""
        self.due, self.ratio = step % self.config.every == 0, None

    def micro(self, batch: TokenBatch, signals: TeacherSignals | None, totals: Totals) -> None:
        """A micro-batch on the device; the first of a step may be measured."""
        if not self.due:
            return
        self.due, self.module.relation_weight = False, None
        try:
            norms = gradient_norms(self.module, self.parts, batch, signals, totals)
        finally:
            self.module.relation_weight = self.weight
        both = torch.stack([norms[OTHERS], norms[RELATION]])
        if self.ranks > 1:
            dist.all_reduce(both)
        self.take(*(both / self.ranks).unbind())

    @torch.no_grad()
    def take(self, others: Tensor, relation: Tensor) -> None:
        """The norms of the other terms' gradient, and of the relations' at weight 1."""
        share = torch.where(self.weight > 0, self.config.smoothing, 0.0)
        wanted = self.config.ratio * others / relation
        mixed = self.weight.clamp_min(torch.finfo(wanted.dtype).tiny).pow(share) * wanted.pow(1 - share)
        usable = mixed.isfinite() & (mixed > 0)  # not where a gradient is 0 or no number
        self.weight.copy_(torch.where(usable, mixed, self.weight))
        self.ratio = self.weight * relation / others

    def figures(self) -> dict[str, Tensor]:
        """The step's weight; where it was measured also the ratio of the norms with it."""
        return {WEIGHT: self.weight} | ({} if self.ratio is None else {RATIO: self.ratio})

    def state(self) -> float:
        """For a checkpoint."""
        return self.weight.item()

    def load(self, weight: float) -> None:
        """Go on from what `state` gave."""
        self.weight.fill_(weight)


def parts_of(objective: Objective, config: AdaptiveWeight) -> dict[str, Objective]:
    """What is measured: the terms to compare with, and the relations with weight 1."""
    assert objective.relation is not None
    terms = tuple(t for t in objective.terms if config.against == OTHERS or t.kind == TermKind.CE)
    states = objective.states if config.against == OTHERS else None
    alone = replace(objective, terms=(), states=None, relation=replace(objective.relation, weight=1.0))
    return {OTHERS: replace(objective, terms=terms, states=states, relation=None), RELATION: alone}
