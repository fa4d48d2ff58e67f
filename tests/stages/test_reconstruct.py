"""A reconstructed block is nearer to what it was than a clipped one, and so is the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bitdistill_ray.core import Format, QuantSpec
from bitdistill_ray.model.forward import hidden_states
from bitdistill_ray.model.surgery import quantize_linears
from bitdistill_ray.quant import ClipGrid
from bitdistill_ray.stages.blocks import blocks
from bitdistill_ray.stages.clip import clip_linear, group_moments
from bitdistill_ray.stages.reconstruct import block_error, train_block
from tests.tiny_models import packed_batch, tiny_model

pytestmark = pytest.mark.slow  # seconds of arithmetic; `make test-fast` stays under two minutes without it

BATCHES = [packed_batch([[9, 5, 3], [14]], 20, seed=seed) for seed in range(6)]
REAL = [batch.segment_BT >= 0 for batch in BATCHES]


def model_error(model: Any, case: str) -> float:
    with torch.no_grad():
        pairs = [
            (hidden_states(model, b)[r], hidden_states(tiny_model(case), b)[r])
            for b, r in zip(BATCHES, REAL, strict=True)
        ]
    return float(sum((ours - theirs).square().mean() for ours, theirs in pairs))


@pytest.mark.parametrize("format", [Format.INT2, Format.NF3, Format.SEQ2, Format.TERNARY])
@pytest.mark.parametrize("case", ["llama", "gemma3"])
def test_training_a_block_takes_errors_away_that_clipping_leaves(case: str, format: Format) -> None:
    errors: dict[bool, list[float]] = {}
    models = {}
    for trains in (False, True):
        model = models[trains] = tiny_model(case)
        quantize_linears(model, QuantSpec(format=format, group_size=16))
        errors[trains] = []
        for block in blocks(model, BATCHES, group_moments, quantised_inputs=True):
            for name, linear in block.linears.items():
                clip_linear(linear, block.statistics[name], ClipGrid(), name=name)
            if trains:
                before = {name: linear.weight.clone() for name, linear in block.linears.items()}
                train_block(block, REAL, epochs=6, learning_rate=3e-3)
                assert all(not torch.equal(before[name], linear.weight) for name, linear in block.linears.items())
            errors[trains].append(block_error(block, REAL))
    assert all(trained < 0.9 * clipped for trained, clipped in zip(errors[True], errors[False], strict=True))
    assert model_error(models[True], case) < 0.9 * model_error(models[False], case)


def test_padding_does_not_count() -> None:
    model = tiny_model("llama")
    quantize_linears(model, QuantSpec(format=Format.INT2, group_size=16))
    block = next(iter(blocks(model, BATCHES, group_moments)))
    error = block_error(block, REAL)
    for target, real in zip(block.targets, REAL, strict=True):
        target[~real] = 1e6
    assert block_error(block, REAL) == pytest.approx(error)
