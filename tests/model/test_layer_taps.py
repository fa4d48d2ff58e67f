"""What layers give is what transformers says they give, in every family; afterwards the model is as it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bitdistill_ray.errors import ModelError
from bitdistill_ray.model.acceleration import decoder_layers
from bitdistill_ray.model.forward import hidden_states
from bitdistill_ray.model.layer_taps import layer_taps
from tests.tiny_models import EVERY_CASE, packed_batch, tiny_model

BATCH = packed_batch([[9, 1, 14], [20]], 24)


def by_hooks(model: nn.Module) -> list[Tensor]:
    outputs: list[Tensor] = []
    handles = [
        layer.register_forward_hook(lambda _, inputs, out: outputs.append(out[0] if isinstance(out, tuple) else out))
        for layer in decoder_layers(model)
    ]
    hidden_states(model, BATCH)
    for handle in handles:
        handle.remove()
    return outputs


@pytest.mark.parametrize("case", EVERY_CASE)
@torch.no_grad()
def test_they_are_the_layers_outputs_in_the_order_asked_and_the_model_is_unchanged(case: str) -> None:
    model = tiny_model(case)
    plain_BTD, outputs, layers = hidden_states(model, BATCH), by_hooks(model), decoder_layers(model)
    with layer_taps(model, (-1, 0, 0)) as taps:
        tapped_BTD = hidden_states(model, BATCH)
    states = taps.states()
    assert states is not None
    assert states.layers == (len(layers) - 1, 0, 0)
    for number, layer in enumerate(states.layers):
        assert torch.equal(states.hidden_BLTD[:, number], outputs[layer])
    assert torch.equal(tapped_BTD, plain_BTD)
    assert all(a is b for a, b in zip(decoder_layers(model), layers, strict=True))


def test_gradients_pass_through_them() -> None:
    model = tiny_model("llama")
    with layer_taps(model, (0,)) as taps:
        hidden_states(model, BATCH)
    states = taps.states()
    assert states is not None
    states.hidden_BLTD.square().mean().backward()
    first, last = (next(layer.parameters()).grad for layer in (decoder_layers(model)[0], decoder_layers(model)[-1]))
    assert first is not None and bool(first.abs().sum() > 0)  # noqa: PT018
    assert last is None  # it comes after


def test_without_layers_nothing_is_kept_and_one_that_is_not_there_is_refused() -> None:
    model = tiny_model("llama")
    with layer_taps(model, ()) as taps:
        hidden_states(model, BATCH)
    assert taps.states() is None
    with pytest.raises(ModelError, match="layers"), layer_taps(model, (99,)):
        pass


def test_the_model_is_as_it_was_after_a_pass_that_failed() -> None:
    model = tiny_model("llama")
    layers = decoder_layers(model)
    with pytest.raises(RuntimeError, match="on purpose"), layer_taps(model, (0, 1)):
        raise RuntimeError("on purpose")
    assert all(a is b for a, b in zip(decoder_layers(model), layers, strict=True))
