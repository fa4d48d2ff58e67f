"""Tapped states are what attention computes with, by hand, in every family; and they cost the model nothing."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bitdistill_ray.core import AttentionStates
from bitdistill_ray.errors import ModelError
from bitdistill_ray.model.forward import hidden_states
from bitdistill_ray.model.taps import attention_taps
from tests.tiny_models import EVERY_CASE, packed_batch, tiny_model

BATCH = packed_batch([[9, 1, 14], [20]], 24)


def rotate(x_BHTC: Tensor, positions_BT: Tensor, theta: float) -> Tensor:
    """RoPE from its definition: pair (i, i + C/2) turns by position * theta^(-2i/C)."""
    half = x_BHTC.shape[-1] // 2
    angle_BT = positions_BT[:, None, :, None] * theta ** (-torch.arange(half).float() / half)
    real, imaginary = x_BHTC[..., :half], x_BHTC[..., half:]
    cos, sin = angle_BT.cos(), angle_BT.sin()
    return torch.cat([real * cos - imaginary * sin, imaginary * cos + real * sin], dim=-1)


def states_by_hand(model: nn.Module, layer: int) -> AttentionStates:
    """Project, norm and rotate the input of one attention layer."""
    attention = model.model.layers[layer].self_attn
    inputs: list[Tensor] = []
    handle = model.model.layers[layer].input_layernorm.register_forward_hook(lambda m, x, y: inputs.append(y))
    hidden_states(model, BATCH)
    handle.remove()
    parameters = model.config.rope_parameters
    theta = parameters.get(getattr(attention, "layer_type", None), parameters)["rope_theta"]

    def heads(linear: nn.Linear) -> Tensor:
        return linear(inputs[0]).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

    q_BHTC, k_BJTC = heads(attention.q_proj), heads(attention.k_proj)
    if hasattr(attention, "q_norm"):
        q_BHTC, k_BJTC = attention.q_norm(q_BHTC), attention.k_norm(k_BJTC)
    return AttentionStates(
        layer=layer,
        q_BHTC=rotate(q_BHTC, BATCH.positions_BT, theta),
        k_BJTC=rotate(k_BJTC, BATCH.positions_BT, theta),
        v_BJTC=heads(attention.v_proj),
    )


@pytest.mark.parametrize("case", EVERY_CASE)
@torch.no_grad()
def test_states_are_those_computed_by_hand_and_the_output_is_unchanged(case: str) -> None:
    model = tiny_model(case)
    with attention_taps(model, (0, -1, 1)) as states:
        tapped_BTD = hidden_states(model, BATCH)
    assert torch.equal(tapped_BTD, hidden_states(model, BATCH))
    assert set(states) == {0, -1, 1}
    for key, layer in ((0, 0), (-1, 1), (1, 1)):
        expected = states_by_hand(model, layer)
        assert states[key].layer == layer
        for name in ("q_BHTC", "k_BJTC", "v_BJTC"):
            torch.testing.assert_close(getattr(states[key], name), getattr(expected, name), rtol=1e-4, atol=1e-5)
        assert states[key].k_BJTC.shape[1] == 2  # not repeated to the four query heads
        assert states[key].q_BHTC.shape[1] == 4


def loss_and_gradients(case: str, *, checkpointed: bool) -> tuple[Tensor, dict[str, Tensor], AttentionStates, Tensor]:
    model = tiny_model(case).train()
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with attention_taps(model, (1,)) as states:
        hidden_BTD = hidden_states(model, BATCH)
        q_before = states[1].q_BHTC
        loss = hidden_BTD.square().mean() + sum(
            getattr(states[1], name).pow(3).mean() for name in ("q_BHTC", "k_BJTC", "v_BJTC")
        )
        loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, states[1], q_before


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("case", EVERY_CASE)
def test_gradients_flow_through_the_states_with_and_without_checkpointing(case: str) -> None:
    loss, gradients, _, _ = loss_and_gradients(case, checkpointed=False)
    same_loss, same_gradients, states, q_before = loss_and_gradients(case, checkpointed=True)
    assert torch.equal(loss, same_loss)
    assert states.q_BHTC is q_before, "the recomputation replaced what the loss was computed from"
    assert gradients.keys() == same_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(same_gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_the_recomputation_may_happen_after_the_taps_are_gone() -> None:
    model = tiny_model("qwen3").train()

    def step(around: bool) -> Tensor:
        model.zero_grad()
        with attention_taps(model, (0,)) as states:
            run = lambda: hidden_states(model, BATCH)  # noqa: E731
            hidden_BTD = checkpoint(run, use_reentrant=False) if around else run()
        (hidden_BTD.mean() + states[0].k_BJTC.square().mean()).backward()
        return model.model.layers[0].self_attn.k_proj.weight.grad.clone()

    torch.testing.assert_close(step(around=True), step(around=False), rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_nothing_stays_alive_and_a_later_pass_replaces_an_earlier_one() -> None:
    model = tiny_model("llama")
    with attention_taps(model, (1,)) as states:
        hidden_states(model, BATCH)
        first = weakref.ref(states[1].q_BHTC)
        hidden_states(model, packed_batch([[5]], 8))
        gc.collect()
        assert first() is None
        assert states[1].q_BHTC.shape[2] == 8
    last = weakref.ref(states[1].q_BHTC)
    del states
    gc.collect()
    assert last() is None
    assert model.config._attn_implementation == "sdpa"
    assert not any(name.startswith("_bitdistill") for module in model.modules() for name in vars(module))


def test_taps_end_when_the_forward_pass_fails() -> None:
    model, batch = tiny_model("llama"), packed_batch([[5]], 8)
    batch.ids_BT += 10**6
    with pytest.raises(IndexError), attention_taps(model, (0,)):
        hidden_states(model, batch)
    assert model.config._attn_implementation == "sdpa"
    assert not hasattr(model.model.layers[0].self_attn, "_bitdistill_tap")


def test_without_layers_nothing_is_tapped_and_wrong_ones_are_refused() -> None:
    model = tiny_model("llama")
    with attention_taps(model, ()) as states:
        assert model.config._attn_implementation == "sdpa"
    assert states == {}
    for layer in (2, -3):
        with pytest.raises(ModelError, match="the model has 2 layers"), attention_taps(model, (layer,)):
            pass
    model.set_attn_implementation("eager")
    with pytest.raises(ModelError, match="'eager'"), attention_taps(model, (0,)):
        pass
