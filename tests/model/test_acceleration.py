"""What `accelerate` chooses, and that compiled layers have the gradients of eager ones."""

from __future__ import annotations

import copy

import pytest
import torch

from bitdistill_ray.core import Format, QuantSpec
from bitdistill_ray.model.acceleration import accelerate, decoder_layers
from bitdistill_ray.model.forward import hidden_states
from bitdistill_ray.model.surgery import quantize_linears
from bitdistill_ray.model.taps import FLEX, SDPA
from tests.tiny_models import EVERY_CASE, packed_batch, tiny_model

GPU = torch.device("cuda", 0)  # only named: nothing here runs on one


@pytest.mark.parametrize("case", EVERY_CASE)
def test_every_family_has_one_decoder_layer_for_each_attention(case: str) -> None:
    model = tiny_model(case)
    assert len(decoder_layers(model)) == model.config.num_hidden_layers


def test_a_cpu_changes_nothing() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    assert "no GPU" in accelerate(model, torch.device("cpu"), length=128)
    assert model.config._attn_implementation == SDPA
    assert not any(layer._compiled_call_impl for layer in decoder_layers(model))


@pytest.mark.parametrize(
    ("dtype", "zero", "tapped", "compiled"),
    [
        (torch.bfloat16, 1, (), [True, True]),
        (torch.bfloat16, 2, (-1,), [True, False]),
        (torch.bfloat16, 3, (), [False, False]),
        (torch.float32, 1, (), [False, False]),
    ],
    ids=["all", "tapped", "zero-3", "fp32"],
)
def test_what_is_compiled(dtype: torch.dtype, zero: int, tapped: tuple[int, ...], compiled: list[bool]) -> None:
    model = tiny_model("llama", head_dim=16).to(dtype)
    said = accelerate(model, GPU, length=256, zero=zero, tapped=tapped)
    assert model.config._attn_implementation == FLEX
    assert [layer._compiled_call_impl is not None for layer in decoder_layers(model)] == compiled
    assert ("not compiled" in said) == (not any(compiled))


@pytest.mark.parametrize(
    ("head", "length", "why"), [(8, 128, "heads of 16, these have 8"), (16, 200, "128 tokens, these have 200")]
)
def test_what_flex_attention_cannot_take_stays_with_sdpa(head: int, length: int, why: str) -> None:
    model = tiny_model("llama", head_dim=head).to(torch.bfloat16)
    assert why in accelerate(model, GPU, length=length)
    assert model.config._attn_implementation == SDPA


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compiled as it is used, for a GPU")
@pytest.mark.parametrize("case", EVERY_CASE)
@pytest.mark.parametrize("length", [24, 128, 200, 256])
@torch.no_grad()
def test_an_accelerated_model_gives_what_the_plain_one_gives(case: str, length: int) -> None:
    torch._dynamo.reset()
    model = tiny_model(case, hidden_size=64).to(GPU, torch.bfloat16)
    fast = copy.deepcopy(model)
    accelerate(fast, GPU, length=length)
    for rows in ([[length // 2, length // 3], [length]], [[length], [length]]):
        batch = packed_batch(rows, length).to(GPU)
        torch.testing.assert_close(hidden_states(fast, batch), hidden_states(model, batch), rtol=5e-2, atol=0.25)


@pytest.mark.slow
@pytest.mark.parametrize("format", [Format.TERNARY, Format.INT2, Format.NF3])
def test_compiled_layers_have_the_gradients_of_eager_ones(format: Format) -> None:
    model = tiny_model("llama").to(torch.bfloat16).train()
    quantize_linears(model, QuantSpec(format=format, group_size=16))
    compiled = copy.deepcopy(model)
    for layer in decoder_layers(compiled):
        layer.compile(backend="aot_eager")
    batch = packed_batch([[9, 7]], 16, seed=0)
    for each in (model, compiled):
        hidden_states(each, batch).float().square().sum().backward()
    for (name, eager), fast in zip(model.named_parameters(), compiled.parameters(), strict=True):
        if eager.grad is None:
            assert fast.grad is None
            continue
        assert fast.grad is not None
        assert eager.grad.abs().max() > 0, name
        torch.testing.assert_close(fast.grad, eager.grad, rtol=3e-2, atol=3e-2 * float(eager.grad.abs().max()))
