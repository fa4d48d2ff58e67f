"""The figures of a packed student, read off its manifest: what `bitdistill inspect` prints and evaluation tabulates.

Bytes are those of the stored tensors; a tied embedding is counted once.  Bits per weight are over the packed linears,
without embedding and head where other matrices are packed: codes, scales and zero points, no padding.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import prod
from typing import Any

from bitdistill_ray.packed.folder import PackedFolder
from bitdistill_ray.packed.manifest import Layout, PackedEntry

EMBEDDINGS = ("embed_tokens", "lm_head")  # modules that are counted apart: they dwarf a small student


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedSummary:
    """The figures of one packed student."""

    path: str
    model_type: str
    format_version: int
    specs: dict[str, int]  # one line for each different QuantSpec -> how many matrices have it
    packed_weights: int
    bits_per_weight: float
    parameters: int
    bytes: int
    bytes_without_embeddings: int
    subln: int
    provenance: dict[str, Any]


def summarise(folder: PackedFolder) -> PackedSummary:
    """The figures of an opened folder; reads no tensor."""
    entries = folder.manifest.packed
    linears = {n: e for n, e in entries.items() if not is_table(n)} or entries
    weights = {name: prod(entry.shape) for name, entry in entries.items()}
    bits = sum(entry.bits_per_weight * weights[name] for name, entry in linears.items())
    plain = {name: prod(folder.manifest.tensors[name].shape) for name in folder.plain_names}
    sizes = {name: tensor_bytes(folder, name) for name in folder.manifest.tensors}
    embeddings = sum(size for name, size in sizes.items() if is_table(name))
    return PackedSummary(
        path=str(folder.path),
        model_type=str(folder.config.get("model_type")),
        format_version=folder.manifest.format_version,
        specs=dict(Counter(describe(entry) for entry in entries.values())),
        packed_weights=sum(weights.values()),
        bits_per_weight=bits / max(1, sum(weights[name] for name in linears)),
        parameters=sum(weights.values()) + sum(plain.values()),
        bytes=sum(sizes.values()),
        bytes_without_embeddings=sum(sizes.values()) - embeddings,
        subln=len(folder.manifest.subln),
        provenance=folder.provenance,
    )


def is_table(name: str) -> bool:
    """Whether a module or tensor of this name is, or is part of, the embedding or the head."""
    return not set(EMBEDDINGS).isdisjoint(name.split("."))


def tensor_bytes(folder: PackedFolder, name: str) -> int:
    """Stored bytes of one tensor."""
    stored = folder.manifest.tensors[name]
    return prod(stored.shape) * stored.dtype.itemsize


def describe(entry: PackedEntry) -> str:
    """`int2, group of 128, fp16 scales`."""
    spec = entry.spec
    shared = f"{spec.granularity} of {spec.group_size}" if spec.group_size else f"per {spec.granularity}"
    activations = f", int{spec.activation_bits} activations" if spec.activation_bits else ""
    trits = ", five codes a byte" if entry.layout is Layout.TRITS else ""
    return f"{spec.format}, {shared}, {spec.scale_dtype} scales{activations}{trits}"
