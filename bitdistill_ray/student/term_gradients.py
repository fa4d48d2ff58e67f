"""How large a gradient each part of an objective has over all trained weights, on one micro-batch.

One more forward and backward pass for each part.  They bypass DeepSpeed (`torch.autograd.grad` accumulates nothing, so
its hooks sleep) and leave the training as it is, bit for bit.  ZeRO-3's shards cannot be differentiated so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from bitdistill_ray.core import TeacherSignals, TokenBatch
from bitdistill_ray.losses.chunked import RELATION, STATES
from bitdistill_ray.losses.objective import Objective
from bitdistill_ray.losses.reduction import Totals
from bitdistill_ray.student.module import LossModule


def gradient_norms(
    module: LossModule,
    parts: Mapping[str, Objective],
    batch: TokenBatch,
    signals: TeacherSignals | None,
    totals: Totals,
) -> dict[str, Tensor]:
    """The norm of each part's gradient over all trained parameters, in place of the module's objective: fp32 scalars
    that nobody waits for."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    whole, norms = module.objective, {}
    for name, objective in parts.items():
        module.objective = objective
        try:
            value, _ = module.loss(batch, signals, totals)
            gradients = torch.autograd.grad(value, parameters, allow_unused=True)
        finally:
            module.objective = whole
        squares = [g.float().square().sum() for g in gradients if g is not None]
        norms[name] = torch.stack(squares).sum().sqrt()
    return norms


def single_terms(objective: Objective) -> dict[str, Objective]:
    """An Objective for each term alone, with its weight, by its name in the loss's parts."""
    alone = {term.name: replace(objective, terms=(term,), relation=None, states=None) for term in objective.terms}
    if objective.relation is not None:
        alone[RELATION] = replace(objective, terms=(), states=None)
    if objective.states is not None:
        alone[STATES] = replace(objective, terms=(), relation=None)
    return alone
