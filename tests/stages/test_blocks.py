"""Blocks read one after the other see what the whole model sees, in every family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bitdistill_ray.core import Format, Granularity, QuantSpec
from bitdistill_ray.model.acceleration import decoder_layers
from bitdistill_ray.model.forward import hidden_states
from bitdistill_ray.model.linear import QuantLinear, plain_linears
from bitdistill_ray.model.surgery import quantize_linears
from bitdistill_ray.quant import Moments, solve_gptq
from bitdistill_ray.stages.blocks import blocks
from tests.tiny_models import EVERY_CASE, packed_batch, tiny_model

BATCHES = [packed_batch([[9, 5, 3], [14]], 20, seed=seed) for seed in range(3)]
INT2 = QuantSpec(format=Format.INT2, granularity=Granularity.GROUP, group_size=16)


def student(case: str) -> Any:
    model = tiny_model(case)
    quantize_linears(model, INT2)
    return model


def whole(linear: QuantLinear) -> Moments:
    return Moments(linear.in_features, linear.in_features)


def of_the_whole_model(model: Any, *, plain: bool) -> dict[str, Tensor]:
    """Second moments of every linear's inputs over the real tokens, from ordinary forward passes."""
    found: dict[str, list[Tensor]] = {}
    linears = {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    for batch in BATCHES:
        real = batch.segment_BT >= 0
        hooks = [
            linear.register_forward_pre_hook(
                lambda _, inputs, name=name, real=real: found.setdefault(name, []).append(inputs[0][real])
            )
            for name, linear in linears.items()
        ]
        with torch.no_grad():
            if plain:
                with plain_linears(model):
                    hidden_states(model, batch)
            else:
                hidden_states(model, batch)
        for hook in hooks:
            hook.remove()
    return {name: (x := torch.cat(parts)).T @ x / len(x) for name, parts in found.items()}


@pytest.mark.parametrize("case", EVERY_CASE)
def test_moments_are_those_of_a_pass_through_the_whole_model(case: str) -> None:
    model = student(case)
    expected = of_the_whole_model(model, plain=True)
    found = {name: m.mean(name) for block in blocks(model, BATCHES, whole) for name, m in block.statistics.items()}
    assert found.keys() == expected.keys()
    for name, moments in expected.items():
        torch.testing.assert_close(found[name], moments, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", EVERY_CASE)
def test_quantised_inputs_are_those_of_the_quantised_blocks_before(case: str) -> None:
    model = student(case)
    found = {
        name: m.mean(name)
        for block in blocks(model, BATCHES, whole, quantised_inputs=True)
        for name, m in block.statistics.items()
    }
    quantised, plain = (of_the_whole_model(model, plain=plain) for plain in (False, True))
    into_the_second = [name for name in found if ".layers.1." in name and "q_proj" in name]
    into_the_first = [name for name in found if ".layers.0." in name and "q_proj" in name]
    for name in into_the_second:  # the first linear of a block: all before it is quantised
        torch.testing.assert_close(found[name], quantised[name], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(found[name], plain[name], rtol=1e-2)
    for name in into_the_first:
        torch.testing.assert_close(found[name], plain[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("quantised_inputs", [False, True])
@pytest.mark.parametrize("case", EVERY_CASE)
def test_targets_are_what_the_model_has_in_full_precision_behind_a_layer(case: str, *, quantised_inputs: bool) -> None:
    model, plain = student(case), tiny_model(case)
    behind: dict[int, list[Tensor]] = {}
    layers = decoder_layers(plain)
    hooks = [layer.register_forward_hook(lambda _, __, out, n=n: behind.setdefault(n, []).append(first_of(out)))
             for n, layer in enumerate(layers)]  # fmt: skip
    with torch.no_grad():
        for batch in BATCHES:
            hidden_states(plain, batch)
    for hook in hooks:
        hook.remove()
    for number, block in enumerate(blocks(model, BATCHES, whole, quantised_inputs=quantised_inputs)):
        for place, (target, expected) in enumerate(zip(block.targets, behind[number], strict=True)):
            torch.testing.assert_close(target, expected, rtol=1e-4, atol=1e-5)
            if number == 0:
                torch.testing.assert_close(block.inputs[place], plain.model.embed_tokens(BATCHES[place].ids_BT))
        with torch.no_grad():
            for linear in block.linears.values():
                linear.weight.mul_(1.1)  # whatever the caller does to a block, later targets are those of the model


def first_of(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def test_only_chosen_linears_are_measured() -> None:
    model = student("llama")
    seen = [set(block.linears) for block in blocks(model, BATCHES, whole, chosen=lambda name: "layers.1" in name)]
    assert len(seen) == 1
    assert all("layers.1" in name for name in seen[0])


@pytest.mark.parametrize("quantised_inputs", [False, True])
def test_gptq_block_by_block_brings_the_model_nearer(quantised_inputs: bool) -> None:
    teacher, rounded, solved = tiny_model("llama"), student("llama"), student("llama")
    for block in blocks(solved, BATCHES, whole, quantised_inputs=quantised_inputs):
        for name, linear in block.linears.items():
            assert linear.spec is not None
            w_NK = solve_gptq(linear.weight, block.statistics[name].mean(name), linear.spec, name=name).w_NK
            with torch.no_grad():
                linear.weight.copy_(w_NK)

    def error(model: Any) -> float:
        with torch.no_grad():
            return float(sum((hidden_states(model, b) - hidden_states(teacher, b)).square().mean() for b in BATCHES))

    assert error(solved) < 0.9 * error(rounded)
