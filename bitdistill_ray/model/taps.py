"""Reading Q, K and V out of chosen attention layers during an ordinary forward pass.

transformers lets one register attention functions by name.  Ours are sdpa's and flex_attention's own, which first hand
the states to whoever listens at that layer; registered with the same mask builder, so the masks (causal, packed,
sliding) are unchanged.  This sees exactly what attention sees, in every family: after RoPE and any q/k norm, K and V
before they are repeated.

The states are part of the autograd graph.  Under activation checkpointing (non-reentrant) the recomputation in the
backward pass is not recorded, so what was tapped stays what the loss was computed from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import flex_attention_mask, sdpa_mask

from bitdistill_ray.core import AttentionStates
from bitdistill_ray.errors import ModelError
from bitdistill_ray.model.families import attention_modules

SDPA = "sdpa"
FLEX = "flex_attention"
TAPPED = {SDPA: "bitdistill-tapped-sdpa", FLEX: "bitdistill-tapped-flex"}
LISTENER = "_bitdistill_tap"  # attribute of a tapped attention module: (states, its keys in there, its layer)


def _hand_out(module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> None:
    listener = getattr(module, LISTENER, None)
    if listener is None:  # asked first, so that a compiled layer that nobody listens to sees nothing of the rest
        return
    recomputing = torch._C._current_graph_task_id() != -1  # as torch.utils.checkpoint asks: inside a backward pass
    if not recomputing:
        states, keys, layer = listener
        states.update(dict.fromkeys(keys, AttentionStates(layer=layer, q_BHTC=query, k_BJTC=key, v_BJTC=value)))


def _tapped_sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    _hand_out(module, query, key, value)
    output: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return output


def _tapped_flex(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, Tensor | None]:
    _hand_out(module, query, key, value)
    output: tuple[Tensor, Tensor | None] = flex_attention_forward(module, query, key, value, attention_mask, **options)
    return output


AttentionInterface.register(TAPPED[SDPA], _tapped_sdpa)
AttentionMaskInterface.register(TAPPED[SDPA], sdpa_mask)
AttentionInterface.register(TAPPED[FLEX], _tapped_flex)
AttentionMaskInterface.register(TAPPED[FLEX], flex_attention_mask)


@contextmanager
def attention_taps(model: nn.Module, layers: Sequence[int]) -> Iterator[dict[int, AttentionStates]]:
    """Inside, every forward pass of `model` puts the states of `layers` into the dict that this yields.

    The dict is keyed as `layers` is; a negative one counts from the last, and its states carry the real number.  A
    later forward pass replaces what an earlier one left.  Nothing else is kept alive, and with no layers nothing is
    changed.

    Raises:
        ModelError: a layer that the model does not have, or attention other than sdpa and flex_attention.
    """
    states: dict[int, AttentionStates] = {}
    if not layers:
        yield states
        return
    config: Any = model.config
    attentions = attention_modules(model)
    for layer in layers:
        if not -len(attentions) <= layer < len(attentions):
            raise ModelError(f"layer {layer}", f"the model has {len(attentions)} layers", "Choose one of 0 to last")
    plain = config._attn_implementation
    if plain not in TAPPED:
        raise ModelError("attention", f"is {plain!r}; only {' and '.join(TAPPED)} can be tapped", "Load with sdpa")
    config._attn_implementation = TAPPED[plain]
    keys_of: dict[int, list[int]] = {}
    for layer in layers:
        keys_of.setdefault(layer % len(attentions), []).append(layer)
    for layer, keys in keys_of.items():
        setattr(attentions[layer], LISTENER, (states, keys, layer))
    try:
        yield states
    finally:
        config._attn_implementation = plain
        for layer in keys_of:
            delattr(attentions[layer], LISTENER)
