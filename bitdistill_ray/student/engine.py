"""One student as a DeepSpeed engine: the optimiser, the learning-rate schedule, the ZeRO configuration.

DeepSpeed keeps fp32 master weights behind a bf16 or fp16 working copy (tiny updates of ternary weights would round away
otherwise); the quantiser sees the working copy, in training as in evaluation and export.  Nothing is compiled at run
time: the optimiser is torch's, and DeepSpeed's shared-memory reduction for CPUs, which it would build on first use
behind a file lock that a killed process never gives back, is left out in favour of gloo.
"""

from __future__ import annotations

import math
from typing import Any

import deepspeed
import torch
from torch import nn

from bitdistill_ray.config import StudentConfig
from bitdistill_ray.stage_config import TrainStage
from bitdistill_ray.student.gradient_norm import clip_unasked, norm_at_once
from bitdistill_ray.student.layout import LongParameters

SHARED_MEMORY_REDUCTION = "deepspeed_shm_comm"


def start_engine(
    module: nn.Module, *, stage: TrainStage, student: StudentConfig, steps: int, dtype: torch.dtype
) -> Any:
    """Wrap `module` for training; torch.distributed must be initialised (Ray Train has done it)."""
    trained = [p for p in module.parameters() if p.requires_grad]
    matrices = module.matrices if isinstance(module, LongParameters) else [p for p in trained if p.ndim > 1]
    others = [p for p in trained if all(p is not m for m in matrices)]
    without_run_time_builds()
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": stage.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=stage.learning_rate,
        betas=stage.betas,
        fused=True,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, steps, stage))
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, lr_scheduler=scheduler, config=zero_config(stage, student, dtype)
    )
    if student.zero in (1, 2) and student.gpus:
        norm_at_once(engine.optimizer)
        clip_unasked(engine.optimizer)
    return engine


def without_run_time_builds() -> None:
    """Keep DeepSpeed from compiling its shared-memory reduction; call it before DeepSpeed does anything."""
    deepspeed.ops.__compatible_ops__[SHARED_MEMORY_REDUCTION] = False


def learning_rate(step: int, steps: int, stage: TrainStage) -> float:
    """The factor on the learning rate in step `step` (from 0) of `steps`: a linear rise, then the schedule."""
    rise = max(1, round(stage.warmup * steps))
    if step < rise:
        return (step + 1) / rise
    progress = (step - rise) / max(1, steps - rise)
    match stage.schedule:
        case "constant":
            return 1.0
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        case "linear":
            return max(0.0, 1 - progress)


def zero_config(stage: TrainStage, student: StudentConfig, dtype: torch.dtype) -> dict[str, Any]:
    """DeepSpeed's configuration."""
    return {
        "train_micro_batch_size_per_gpu": student.micro_batch,
        "gradient_accumulation_steps": student.passes(stage.batch_sequences),
        "gradient_clipping": stage.clip_norm,
        "zero_optimization": {"stage": student.zero},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # asked of each gradient by itself, in several kernels; the worker looks at their common norm instead
        "bf16": {"enabled": dtype is torch.bfloat16, "check_grad_overflow": False},
        "fp16": {"enabled": dtype is torch.float16},
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
