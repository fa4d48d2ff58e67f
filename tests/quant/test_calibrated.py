"""Ternary weights that GPTQ and AWQ begin: made for the inputs they were calibrated on, and for no others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bitdistill_ray.core import Format, Granularity, QuantSpec
from bitdistill_ray.quant import Moments, dequantize, quantize, search_scales, solve_gptq
from bitdistill_ray.quant.moments import output_errors

N, K = 48, 144
SPECS = [
    QuantSpec(format=Format.TERNARY, granularity=Granularity.TENSOR, group_size=None, activation_bits=8),
    QuantSpec(format=Format.TERNARY, granularity=Granularity.BLOCK, group_size=64, activation_bits=8),
]


def gptq(w: Tensor, gram: Tensor, spec: QuantSpec) -> Tensor:
    return dequantize(quantize(solve_gptq(w, gram, spec).w_NK, spec))


def awq(w: Tensor, gram: Tensor, spec: QuantSpec) -> Tensor:
    s_K, _, _ = search_scales([(w, spec)], gram)
    return dequantize(quantize(w * s_K, spec)) / s_K


def moments(seed: int) -> Tensor:
    """Of inputs that depend on each other; other ones carry much for every seed."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(800, 30, generator=g) @ torch.randn(30, K, generator=g) + 0.5 * torch.randn(800, K, generator=g)
    x[:, torch.randperm(K, generator=g)[:12]] *= 12.0
    counted = Moments(K, K)
    counted.add(x)
    return counted.mean("x")


@pytest.mark.parametrize("method", [gptq, awq])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: str(spec.granularity))
def test_its_own_inputs_are_served_best(spec: QuantSpec, method: Callable[[Tensor, Tensor, QuantSpec], Tensor]) -> None:
    w = torch.randn(N, K, generator=torch.Generator().manual_seed(9)) * 0.02
    grams = [moments(seed) for seed in (1, 2)]
    made = [method(w, gram, spec) for gram in grams]
    rounded = dequantize(quantize(w, spec))
    for own, gram in enumerate(grams):

        def error(values: Tensor, gram: Tensor = gram) -> float:
            return float(output_errors(w - values, gram).sum())

        assert error(made[own]) < 0.85 * error(rounded)
        assert error(made[own]) < 0.85 * error(made[1 - own])
