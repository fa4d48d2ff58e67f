"""The learning rate in closed form, and DeepSpeed's configuration as DeepSpeed reads it."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal

import pytest
import torch
from deepspeed.runtime.config import DeepSpeedConfig
from hypothesis import given
from hypothesis import strategies as st

from bitdistill_ray.config import StudentConfig
from bitdistill_ray.stage_config import DistillStage
from bitdistill_ray.student.engine import learning_rate, zero_config

Schedule = Literal["linear", "cosine", "constant"]


def factors(schedule: Schedule, *, steps: int, warmup: float) -> list[float]:
    stage = DistillStage(schedule=schedule, warmup=warmup)
    return [learning_rate(step, steps, stage) for step in range(steps)]


def test_a_linear_schedule_by_hand() -> None:
    """Two of ten steps rise to 1; the other eight fall by an eighth each, and the last still moves the weights."""
    expected = [0.5, 1, *(1 - i / 8 for i in range(8))]
    assert factors("linear", steps=10, warmup=0.2) == pytest.approx(expected)


def test_a_cosine_schedule_by_hand() -> None:
    expected = [0.5, 1, *(math.cos(math.pi * i / 16) ** 2 for i in range(8))]
    assert factors("cosine", steps=10, warmup=0.2) == pytest.approx(expected)


def test_a_constant_rate_without_warmup_is_constant() -> None:
    """BitDistiller's: WarmupLR from 8e-6 to 8e-6."""
    assert factors("constant", steps=5, warmup=0) == [1.0] * 5


def test_warmup_may_take_the_whole_run() -> None:
    assert factors("linear", steps=4, warmup=1) == pytest.approx([0.25, 0.5, 0.75, 1])


def test_one_step_is_taken_at_the_full_rate() -> None:
    assert factors("linear", steps=1, warmup=0.05) == [1.0]


@given(schedule=st.sampled_from(["linear", "cosine", "constant"]), steps=st.integers(1, 300), warmup=st.floats(0, 1))
def test_a_rate_rises_once_then_never_again_and_is_always_above_zero(
    schedule: Schedule, steps: int, warmup: float
) -> None:
    found = factors(schedule, steps=steps, warmup=warmup)
    peak = found.index(max(found))
    assert max(found) == 1
    assert all(a < b for a, b in pairwise(found[: peak + 1]))
    assert all(a >= b for a, b in pairwise(found[peak:]))
    assert min(found) > 0


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_deepspeed_reads_what_was_meant(zero: Literal[0, 1, 2, 3], dtype: torch.dtype) -> None:
    stage = DistillStage(batch_sequences=12, clip_norm=0.7)
    read = DeepSpeedConfig(zero_config(stage, StudentConfig(micro_batch=4, zero=zero), dtype))
    assert (read.train_micro_batch_size_per_gpu, read.gradient_accumulation_steps, read.train_batch_size) == (4, 3, 12)
    assert read.gradient_clipping == 0.7
    assert read.zero_optimization_stage == zero
    assert (read.bfloat16_config.enabled, read.float16_config.enabled) == (
        dtype is torch.bfloat16,
        dtype is torch.float16,
    )


@pytest.mark.parametrize(("workers", "micro", "passes"), [(1, 4, 3), (1, 12, 1), (1, 64, 1), (3, 2, 2), (6, 2, 1)])
def test_micro_batches_of_a_step_of_twelve(workers: int, micro: int, passes: int) -> None:
    student = StudentConfig(workers=workers, micro_batch=micro)
    assert student.passes(12) == passes
    assert (
        zero_config(DistillStage(batch_sequences=12), student, torch.float32)["gradient_accumulation_steps"] == passes
    )
