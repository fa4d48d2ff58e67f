"""`clip`: the asymmetric clipping search of BitDistiller, before any training.

The inputs of every linear are measured with the student's quantisation switched off, reduced to Gram matrices on the
fly (so that no activation is kept), and each group's range is then searched over the grid of `quant.clip`.
"""

from __future__ import annotations

from contextlib import ExitStack
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from bitdistill_ray.core import TokenBatch
from bitdistill_ray.hardware import compute_dtype, local_device
from bitdistill_ray.model.forward import hidden_states
from bitdistill_ray.model.linear import QuantLinear, plain_linears
from bitdistill_ray.model.student import load_student, save_student
from bitdistill_ray.quant import ClipGrid, ClipStatistics, apply_clip, initial_alpha, search_clip
from bitdistill_ray.runs import StageRecord, provenance
from bitdistill_ray.stage_config import ClipStage
from bitdistill_ray.stages.base import StageContext, stage
from bitdistill_ray.stages.cluster import on_cluster
from bitdistill_ray.stages.corpus import corpus_of, first_batches
from bitdistill_ray.stages.notes import Notes


@stage("clip")
def clip(context: StageContext) -> StageRecord:
    """Publish `student/`, whose latent weights are clipped."""
    return on_cluster(_clip, context)


def _clip(context: StageContext, notes: Notes) -> StageRecord:
    options, config = context.stage, context.config
    assert isinstance(options, ClipStage)
    device = local_device()
    dtype, _ = compute_dtype(config.student.dtype, device)
    source = context.fetch("student")
    model, tokenizer = load_student(source, dtype=dtype, device=device)
    batches = first_batches(corpus_of(context, str(source)), options.calibration_sequences)
    statistics = gather_statistics(model, batches)
    chosen = [name for name in statistics if not any(fnmatchcase(name, pattern) for pattern in options.exclude)]
    grid = ClipGrid(steps=options.grid, max_shrink=options.shrink)
    before, after = 0.0, 0.0
    for name in notes.each(chosen):
        linear: Any = model.get_submodule(name)
        ranges = search_clip(linear.weight, statistics.pop(name), linear.spec, grid, name=name)
        with torch.no_grad():
            linear.weight.copy_(apply_clip(linear.weight, ranges, linear.spec))
            if linear.alpha is not None:
                linear.alpha.copy_(initial_alpha(linear.weight, linear.spec))
        before += float(ranges.error_before_RG.sum())
        after += float(ranges.error_after_RG.sum())
    with context.run.publish(context.path("student")) as folder:
        save_student(folder, model, tokenizer, provenance=provenance(config, stage=context.name))
    path, left = context.path("student"), after / before if before else 1.0
    return context.record({"student": path, "clipped": path}, linears=len(chosen), error_left=round(left, 4))


def gather_statistics(model: Any, batches: list[TokenBatch]) -> dict[str, ClipStatistics]:
    """Gram matrices of the inputs of every quantised linear, over the real tokens of `batches`, by name."""
    device = next(model.parameters()).device
    statistics: dict[str, ClipStatistics] = {}

    def count(name: str, linear: QuantLinear, x_BTK: Tensor, real_BT: Tensor) -> None:
        assert linear.spec is not None
        if name not in statistics:
            statistics[name] = ClipStatistics(x_BTK.shape[-1], linear.spec, device=device)
        statistics[name].add(x_BTK[real_BT])

    with plain_linears(model) as linears, torch.no_grad():
        for batch in batches:
            on_device = batch.to(device)
            real_BT = on_device.segment_BT >= 0
            with ExitStack() as hooks:
                for name, linear in linears:
                    if linear.spec is not None:
                        hook = linear.register_forward_pre_hook(
                            lambda _, inputs, name=name, linear=linear, real_BT=real_BT: count(
                                name, linear, inputs[0], real_BT
                            )
                        )
                        hooks.callback(hook.remove)
                hidden_states(model, on_device)
    return statistics
