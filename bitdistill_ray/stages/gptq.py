"""`gptq`: weights whose codes make up for each other's rounding errors, before any training (`quant/gptq.py`).

With `clip` the ranges are searched first, as the `clip` stage does, and GPTQ fills them with codes; without it the
scales follow from the largest weights, as in the paper.
"""

from __future__ import annotations

import torch

from bitdistill_ray.quant import ClipStatistics, apply_clip, initial_alpha, search_clip, solve_gptq
from bitdistill_ray.runs import StageRecord
from bitdistill_ray.stage_config import GPTQStage
from bitdistill_ray.stages.base import StageContext, stage
from bitdistill_ray.stages.calibration import Calibration, calibrated, whole_moments
from bitdistill_ray.stages.notes import Notes


@stage("gptq")
def gptq(context: StageContext) -> StageRecord:
    """Publish `student/`, whose latent weights have GPTQ's codes."""
    return calibrated(_gptq, context, role="gptq")


def _gptq(student: Calibration, notes: Notes) -> tuple[float, float]:
    options = student.options
    assert isinstance(options, GPTQStage)
    before, after = 0.0, 0.0
    for name, linear, moments in student.each(notes, whole_moments):
        spec, like_NK = linear.spec, None
        assert spec is not None
        if options.clip:
            ranges = search_clip(linear.weight, ClipStatistics.of(moments, spec), spec, name=name)
            like_NK = apply_clip(linear.weight, ranges, spec)
        alpha = None if linear.alpha is None else initial_alpha(linear.weight if like_NK is None else like_NK, spec)
        solved = solve_gptq(linear.weight, moments.mean(name), spec, alpha=alpha, like_NK=like_NK,
                            damping=options.damping, by_activation=options.by_activation, name=name)  # fmt: skip
        with torch.no_grad():
            linear.weight.copy_(solved.w_NK)
            if linear.alpha is not None and alpha is not None:
                linear.alpha.copy_(alpha)
        before, after = before + solved.error_before, after + solved.error_after
    return before, after
