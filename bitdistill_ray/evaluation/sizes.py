"""What a model weighs on disk: bits per weight and bytes, with and without its embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bitdistill_ray.model.linear import QuantLinear
from bitdistill_ray.packed.folder import PackedFolder
from bitdistill_ray.packed.summary import summarise
from bitdistill_ray.packed.weight import pack
from bitdistill_ray.quant import block_as_group, quantize


@dataclass(frozen=True, slots=True)
class Sizes:
    """`bits_per_weight` is over the quantised matrices (16 where there are none); a tied embedding counts once."""

    bits_per_weight: float
    bytes: int
    bytes_without_embeddings: int


def packed_sizes(folder: PackedFolder) -> Sizes:
    """Of a packed student, from its manifest."""
    summary = summarise(folder)
    return Sizes(summary.bits_per_weight, summary.bytes, summary.bytes_without_embeddings)


def model_sizes(model: Any) -> Sizes:
    """Of a live causal LM, as it would be stored: QuantLinears packed, all else in 16 bits, whatever it is held in."""
    quantised = {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear) and m.spec is not None}
    weights, bits, packed_bytes = 0, 0.0, 0
    for name, linear in quantised.items():
        assert linear.spec is not None
        packed = pack(block_as_group(quantize(linear.weight, linear.spec, alpha=linear.alpha, name=name)))
        weights += linear.weight.numel()
        bits += packed.spec.bits_per_weight(*packed.shape) * linear.weight.numel()
        packed_bytes += sum(t.nbytes for t in (packed.codes, packed.scales, packed.zeros) if t is not None)
    replaced = {f"{name}.{part}" for name in quantised for part in ("weight", "alpha")}
    plain = {name: p.numel() for name, p in model.named_parameters() if name not in replaced}
    total = packed_bytes + 2 * sum(plain.values())
    return Sizes(bits / weights if weights else 16.0, total, total - 2 * embedding_weights(model))


def embedding_weights(model: Any) -> int:
    """Weights of the input embedding and, where it is not tied to it, of the head."""
    tables: dict[int, Tensor] = {
        id(m.weight): m.weight for m in (model.get_input_embeddings(), model.get_output_embeddings())
    }
    return sum(table.numel() for table in tables.values())
