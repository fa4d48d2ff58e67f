"""A student made fast on a GPU: attention that skips what the mask forbids, and decoder layers compiled.

    attention   transformers' flex_attention, which takes every family's mask (packed documents, sliding windows, soft
                caps) as a block mask; sdpa with an explicit mask falls back to a kernel that multiplies masked blocks
    layers      torch.compile, layer by layer: fake quantisation, norms and RoPE fuse into a few kernels, and one
                compiled layer serves them all

On CPUs nothing is changed: there exact resume and the teachers' numerics matter, and compiling costs a minute.  Layers
stay uncompiled under ZeRO-3, whose hooks gather parameters in the middle of a layer, and in fp32, where torch 2.11's
compiled fake quantisers hand out zero gradients (docs/LOG.md).  flex_attention takes rows of whole blocks only: in a
compiled layer shorter rows came out wrong.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from transformers.utils import is_torch_flex_attn_available

from bitdistill_ray.model.families import attention_modules, head_size
from bitdistill_ray.model.taps import FLEX

LEAST_HEAD = 16
BLOCK = 128  # queries and keys of a block of flex_attention's masks


def accelerate(
    model: nn.Module, device: torch.device, *, length: int, zero: int = 0, tapped: Collection[int] = ()
) -> str:
    """Change `model` in place, before an engine wraps it; returns what was done and why, to be printed.

    `length`: tokens of a row.
    `tapped`: layers whose attention states are read; they stay uncompiled, since a graph cannot hand them out.
    """
    if device.type != "cuda":
        return "attention by sdpa, layers not compiled: no GPU"
    config: Any = model.config
    said = "attention by sdpa: this torch has no flex_attention"
    if head_size(config) < LEAST_HEAD:
        said = f"attention by sdpa: flex_attention wants heads of {LEAST_HEAD}, these have {head_size(config)}"
    elif length % BLOCK:
        said = f"attention by sdpa: flex_attention wants rows of whole blocks of {BLOCK} tokens, these have {length}"
    elif is_torch_flex_attn_available():
        config._attn_implementation = FLEX
        said = "attention by flex_attention, which skips what packing masks out"
    if zero == 3:
        return f"{said}; layers not compiled: ZeRO-3 gathers inside them"
    if next(model.parameters()).dtype not in (torch.bfloat16, torch.float16):
        return f"{said}; layers not compiled: only 16-bit ones are"
    layers = decoder_layers(model)
    chosen = [layer for number, layer in enumerate(layers) if number not in {t % len(layers) for t in tapped}]
    for layer in chosen:
        layer.compile()
    return f"{said}; {len(chosen)} of {len(layers)} layers compiled (the first step takes about a minute)"


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The modules that hold one attention each, in order."""
    names = {id(module): name for name, module in model.named_modules()}
    parents = [names[id(attention)].rpartition(".")[0] for attention in attention_modules(model)]
    return [model.get_submodule(name) for name in parents]
