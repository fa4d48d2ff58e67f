"""GPTQ against its equations taken literally, and what it must do for every format."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitdistill_ray.core import Format, Granularity, QuantSpec
from bitdistill_ray.errors import ModelError
from bitdistill_ray.quant import dequantize, initial_alpha, quantize, solve_gptq
from bitdistill_ray.quant.gptq import output_error

N, K, GROUP = 24, 200, 64  # the last group of a row has 8 weights
SPECS = [QuantSpec(format=format, granularity=Granularity.GROUP, group_size=GROUP) for format in Format]
OTHERS = [
    QuantSpec(format=Format.INT2, granularity=Granularity.ROW, group_size=None),
    QuantSpec(format=Format.TERNARY, granularity=Granularity.TENSOR, group_size=None),
    QuantSpec(format=Format.TERNARY, granularity=Granularity.BLOCK, group_size=48),
]


def name_of(spec: QuantSpec) -> str:
    return f"{spec.format}-{spec.granularity}"


def layer(*, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Weights, and second moments of inputs that depend on each other."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(N, K, generator=g) * 0.02
    x = torch.randn(600, 40, generator=g) @ torch.randn(40, K, generator=g) + torch.randn(600, K, generator=g)
    x *= torch.rand(K, generator=g) + 0.1
    return w.to(dtype), x.T @ x / len(x)


def alpha_of(w: Tensor, spec: QuantSpec) -> Tensor | None:
    return initial_alpha(w, spec) if spec.format.learns_scale else None


def literally(w: Tensor, gram: Tensor, levels_of: object, damping: float) -> Tensor:
    """Columns in their order, each update at once, in float64; `levels_of(j)` gives the levels of each row's column."""
    h = gram.double() + damping * gram.double().diagonal().mean() * torch.eye(K, dtype=torch.float64)
    inverse = torch.linalg.inv(h)
    w, out = w.double().clone(), torch.empty(N, K, dtype=torch.float64)
    for j in range(K):
        levels = levels_of(j)  # type: ignore[operator]
        out[:, j] = levels.gather(1, (levels - w[:, j, None]).abs().argmin(1, keepdim=True))[:, 0]
        error = (w[:, j] - out[:, j]) / inverse[j, j]
        w[:, j:] -= error[:, None] * inverse[j, j:]
        inverse = inverse - inverse[:, j, None] * inverse[None, j] / inverse[j, j]
    return out


def test_it_is_the_optimal_brain_surgeons_update_column_by_column() -> None:
    w, gram = layer()
    spec = QuantSpec(format=Format.INT3, granularity=Granularity.ROW, group_size=None)
    before = quantize(w, spec)
    assert before.zero is not None
    levels = (torch.arange(8.0) - before.zero.float()) * before.scale
    solved = solve_gptq(w, gram, spec, by_activation=False, damping=0.05)
    found = dequantize(quantize(solved.w_NK, spec))
    expected = literally(w, gram, lambda _: levels.double(), 0.05)
    same = (found - expected).abs() < 1e-6
    assert same.double().mean() > 0.99  # a weight moved onto its row's range, or one half-way between two levels


@pytest.mark.parametrize("spec", [*SPECS, *OTHERS], ids=name_of)
def test_the_output_is_nearer_than_rounding_makes_it(spec: QuantSpec) -> None:
    w, gram = layer()
    alpha = alpha_of(w, spec)
    solved = solve_gptq(w, gram, spec, alpha=alpha)
    assert solved.error_before == pytest.approx(output_error(w, w, gram, spec, alpha))
    assert solved.error_after == pytest.approx(output_error(w, solved.w_NK, gram, spec, alpha))
    assert solved.error_after < 0.8 * solved.error_before


@pytest.mark.parametrize("spec", [*SPECS, *OTHERS], ids=name_of)
def test_latent_weights_keep_the_scales(spec: QuantSpec) -> None:
    w, gram = layer()
    alpha = alpha_of(w, spec)
    before, after = (quantize(x, spec, alpha=alpha) for x in (w, solve_gptq(w, gram, spec, alpha=alpha).w_NK))
    torch.testing.assert_close(after.scale, before.scale, rtol=2**-10, atol=0)
    if before.zero is not None:
        assert after.zero is not None
        assert torch.equal(after.zero, before.zero)


@pytest.mark.parametrize("spec", SPECS, ids=name_of)
def test_inputs_that_do_not_know_each_other_need_no_correction(spec: QuantSpec) -> None:
    w, _ = layer()
    alpha = alpha_of(w, spec)
    solved = solve_gptq(w, torch.diag(torch.rand(K) + 0.5), spec, alpha=alpha)
    assert torch.equal(quantize(solved.w_NK, spec, alpha=alpha).codes_NK, quantize(w, spec, alpha=alpha).codes_NK)


def test_inputs_that_are_never_there_keep_their_weights() -> None:
    w, gram = layer()
    spec = SPECS[0]
    gram[:5], gram[:, :5] = 0.0, 0.0
    solved = solve_gptq(w, gram, spec)
    assert torch.isfinite(solved.w_NK).all()
    assert solved.error_after < solved.error_before


def test_sixteen_bit_weights_stay_in_their_dtype() -> None:
    w, gram = layer(dtype=torch.bfloat16)
    solved = solve_gptq(w, gram, SPECS[1])
    assert solved.w_NK.dtype is torch.bfloat16
    assert solved.error_after < 0.8 * solved.error_before


def test_what_does_not_fit_is_named() -> None:
    w, gram = layer()
    with pytest.raises(ModelError, match=r"q_proj: second moments \[199, 199\] for 200 inputs"):
        solve_gptq(w, gram[1:, 1:], SPECS[0], name="q_proj")
    gram[3, 3] = torch.nan
    with pytest.raises(ModelError, match="q_proj: squared activations: 1 of 40000 values are not finite"):
        solve_gptq(w, gram, SPECS[0], name="q_proj")
