"""`clip`: the asymmetric clipping search of BitDistiller, before any training.

The inputs of every linear are measured block by block (`blocks.py`), reduced to Gram matrices on the fly (so that no
activation is kept), and each group's range is then searched over the grid of `quant.clip`.
"""

from __future__ import annotations

import torch

from bitdistill_ray.model.linear import QuantLinear
from bitdistill_ray.quant import ClipGrid, ClipStatistics, apply_clip, initial_alpha, search_clip
from bitdistill_ray.quant.clip import ClipRange
from bitdistill_ray.runs import StageRecord
from bitdistill_ray.stage_config import ClipStage
from bitdistill_ray.stages.base import StageContext, stage
from bitdistill_ray.stages.calibration import Calibration, calibrated
from bitdistill_ray.stages.notes import Notes


@stage("clip")
def clip(context: StageContext) -> StageRecord:
    """Publish `student/`, whose latent weights are clipped."""
    return calibrated(_clip, context, role="clipped")


def _clip(student: Calibration, notes: Notes) -> tuple[float, float]:
    options = student.options
    assert isinstance(options, ClipStage)
    grid, before, after = ClipGrid(steps=options.grid, max_shrink=options.shrink), 0.0, 0.0
    for name, linear, statistics in student.each(notes, group_moments):
        ranges = clip_linear(linear, statistics, grid, name=name)
        before += float(ranges.error_before_RG.sum())
        after += float(ranges.error_after_RG.sum())
    return before, after


@torch.no_grad()
def clip_linear(linear: QuantLinear, statistics: ClipStatistics, grid: ClipGrid, *, name: str) -> ClipRange:
    """Search the ranges of a linear's groups and clip its latent weights to them; learned scales start from those."""
    assert linear.spec is not None
    ranges = search_clip(linear.weight, statistics, linear.spec, grid, name=name)
    linear.weight.copy_(apply_clip(linear.weight, ranges, linear.spec))
    if linear.alpha is not None:
        linear.alpha.copy_(initial_alpha(linear.weight, linear.spec))
    return ranges


def group_moments(linear: QuantLinear) -> ClipStatistics:
    """Empty Gram matrices of each group of a linear's inputs."""
    assert linear.spec is not None
    return ClipStatistics(linear.in_features, linear.spec, device=linear.weight.device)
