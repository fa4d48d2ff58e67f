"""The norm of all gradients at once is DeepSpeed's own."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from deepspeed import comm
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

from bitdistill_ray.student.engine import without_run_time_builds
from bitdistill_ray.student.gradient_norm import CLIP, METHOD, clip_unasked, global_norm, norm_at_once


@pytest.fixture(autouse=True, scope="module")
def alone() -> Iterator[None]:
    """A process group of this process only."""
    without_run_time_builds()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    comm.init_distributed("gloo")
    yield
    dist.destroy_process_group()


def optimizer() -> SimpleNamespace:
    """As much of DeepSpeed's optimiser as its norm asks for."""
    own = SimpleNamespace(
        model_parallel_rank=0, dp_process_group=None, device="cpu", _model_parallel_all_reduce=lambda **_: None
    )
    theirs = getattr(DeepSpeedZeroOptimizer, METHOD)
    setattr(own, METHOD, lambda gradients, params, norm_type=2: theirs(own, gradients, params, norm_type))
    return own


def gradients(dtype: torch.dtype) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    made = [(torch.randn(shape, generator=g) * scale).to(dtype) for shape, scale in (((40, 30), 1e-4), ((7,), 50.0))]
    padding = torch.zeros(3, dtype=dtype)
    padding._zero_padding = True  # type: ignore[attr-defined]
    return [*made, padding]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_is_what_deepspeed_computes_one_by_one(dtype: torch.dtype) -> None:
    own, made = optimizer(), gradients(dtype)
    params = [torch.nn.Parameter(gradient) for gradient in made[:2]]
    expected = getattr(own, METHOD)(made, params)
    norm_at_once(own)
    torch.testing.assert_close(getattr(own, METHOD)(made, params), expected, rtol=1e-6, atol=0)
    exact = sum(float(gradient.double().square().sum()) for gradient in made) ** 0.5
    torch.testing.assert_close(float(expected), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_norm_that_is_not_finite_is_said_as_deepspeed_says_it(value: float) -> None:
    made = gradients(torch.bfloat16)
    made[1][3] = value
    assert float(global_norm(made)) == -1.0


@pytest.mark.parametrize("norm", [0.5, 40.0, -1.0, float("inf")])
@pytest.mark.parametrize("loss_scale", [1.0, 1024.0])
def test_clipping_is_deepspeeds(norm: float, loss_scale: float) -> None:
    theirs = getattr(DeepSpeedZeroOptimizer, CLIP)
    own = SimpleNamespace(clip_grad=1.0, loss_scale=loss_scale, device="cpu")
    expected, found = gradients(torch.float32), gradients(torch.float32)
    theirs(own, [expected[0], expected[1:]], torch.tensor(norm * loss_scale if norm > 0 else norm))
    own_clip = SimpleNamespace(clip_grad=1.0, loss_scale=loss_scale)
    setattr(own_clip, CLIP, lambda *_: pytest.fail("asked DeepSpeed's"))
    clip_unasked(own_clip)
    getattr(own_clip, CLIP)([found[0], found[1:]], torch.tensor(norm * loss_scale if norm > 0 else norm))
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-6, atol=0)
    assert (float(found[0].abs().max()) == 0) == (not 0 < norm < float("inf"))


def test_an_optimiser_of_another_kind_is_left_alone() -> None:
    other = SimpleNamespace(step=print)
    norm_at_once(other)
    clip_unasked(other)
    assert vars(other) == {"step": print}
