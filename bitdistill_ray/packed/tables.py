"""The tables of a model, its token embedding and its LM head, in 8 or 4 bits: `export`'s `head_bits`.

A small model is mostly tables (21 % of the weights of a 135M model, 26 % of one of 0.6B), and the head is read whole
for every token: beside 2-bit linears a 16-bit head is most of what a token costs.  Tied tables are packed once.

    16   as they are
    8    one scale a row, rounded to nearest: the logits hardly feel it
    4    a scale and a zero point for 32 weights, each range clipped where that makes the squared error smaller

Activations are quantised in front of the head where they are in front of the model's linears.  What packed tables cost
a model is measured, and printed, by `evaluation.head_cost`.
"""

from __future__ import annotations

from dataclasses import replace
from enum import IntEnum
from typing import Any

import torch
from torch import nn

from bitdistill_ray.core import Format, Granularity, PackedWeight, QuantSpec, ScaleDtype
from bitdistill_ray.model.linear import QuantLinear
from bitdistill_ray.packed.weight import pack
from bitdistill_ray.quant import ClipGrid, ClipStatistics, apply_clip, quantize, search_clip

GRID = ClipGrid(steps=16, max_shrink=0.2)


class HeadBits(IntEnum):
    """Bits of a weight of the embedding and the head."""

    FOUR = 4
    EIGHT = 8
    SIXTEEN = 16


SPECS = {
    HeadBits.EIGHT: QuantSpec(
        format=Format.INT8, granularity=Granularity.ROW, group_size=None, scale_dtype=ScaleDtype.FP32
    ),
    HeadBits.FOUR: QuantSpec(format=Format.INT4, group_size=32),
}
"""fp32 scales where there is one a row: the rows of tokens that never occurred can be tiny."""


def packed_tables(model: Any, bits: HeadBits) -> dict[str, PackedWeight]:
    """The packed embedding and, where it is another matrix and not packed as a linear already, the head, by name."""
    linears = {m.spec.activation_bits for m in model.modules() if isinstance(m, QuantLinear) and m.spec is not None}
    spec = table_spec(bits, min(linears, key=lambda bits: bits or HeadBits.SIXTEEN, default=None))
    return {} if spec is None else {name: _packed(table, spec, name) for name, table in tables(model).items()}


def table_spec(bits: HeadBits, activation_bits: int | None) -> QuantSpec | None:
    """How tables of so many bits are packed; None: they are not.  `activation_bits` is that of the linears."""
    return replace(SPECS[bits], activation_bits=activation_bits) if bits in SPECS else None


def tables(model: Any) -> dict[str, nn.Module]:
    """The embedding and, where it is another matrix and no quantised linear, the head, by name."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    found = {id(embedding.weight): embedding}
    if not (isinstance(head, QuantLinear) and head.spec is not None):
        found.setdefault(id(head.weight), head)
    return {n: module for n, module in model.named_modules() if any(module is table for table in found.values())}


@torch.no_grad()
def _packed(table: Any, spec: QuantSpec, name: str) -> PackedWeight:
    w_NK = table.weight.detach()
    if spec.format is Format.INT4:
        every_input_alike = ClipStatistics(w_NK.shape[1], spec)
        every_input_alike.add(torch.eye(w_NK.shape[1]))
        w_NK = apply_clip(w_NK, search_clip(w_NK, every_input_alike, spec, GRID, name=name), spec)
    return pack(quantize(w_NK, spec, name=name))
