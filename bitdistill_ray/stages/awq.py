"""`awq`: channels that carry much are made larger before rounding, before any training (`quant/awq.py`).

The student's function stays (`model/channels.py`): what is multiplied into one linear is divided out of the norm or
the linear before it.  `clip` or `gptq` may follow.
"""

from __future__ import annotations

import torch

from bitdistill_ray.model.channels import scalable_channels
from bitdistill_ray.model.linear import QuantLinear
from bitdistill_ray.quant import initial_alpha, search_scales
from bitdistill_ray.runs import StageRecord
from bitdistill_ray.stage_config import AWQStage
from bitdistill_ray.stages.base import StageContext, stage
from bitdistill_ray.stages.calibration import Calibration, calibrated, whole_moments
from bitdistill_ray.stages.notes import Notes


@stage("awq")
def awq(context: StageContext) -> StageRecord:
    """Publish `student/`, whose channels are scaled."""
    return calibrated(_awq, context, role="awq")


def _awq(student: Calibration, notes: Notes) -> tuple[float, float]:
    options = student.options
    assert isinstance(options, AWQStage)
    before, after = 0.0, 0.0
    for block in student.blocks(notes, whole_moments):
        name_of = {linear: name for name, linear in block.linears.items()}
        for channels in scalable_channels(student.model, block.layer):
            measured = [r for r in channels.readers if isinstance(r, QuantLinear) and r in name_of]
            weights = [(r.weight, r.spec) for r in measured if r.spec is not None]
            if not weights:
                continue
            name = name_of[measured[0]]
            s_K, error_before, error_after = search_scales(weights, block.statistics[name].mean(name),
                                                           steps=options.steps, tie=channels.tie)  # fmt: skip
            channels.scale(s_K)
            before, after = before + error_before, after + error_after
        for linear in block.layer.modules():  # an excluded one may have been scaled with its neighbours
            if isinstance(linear, QuantLinear) and linear.alpha is not None and linear.spec is not None:
                with torch.no_grad():
                    linear.alpha.copy_(initial_alpha(linear.weight, linear.spec))
    return before, after
