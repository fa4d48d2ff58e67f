"""python -m bitdistill_ray.inspect PATH [--json] [--tensors]    what a packed student holds, after checking every byte.

PATH is a packed folder, local or at a URL.  Bytes are those of the stored tensors; a tied embedding is counted once.
Bits per weight are over the packed matrices: codes, scales and zero points, no padding.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from bitdistill_ray.core import QuantSpec
from bitdistill_ray.errors import BitdistillError
from bitdistill_ray.packed.folder import PackedFolder
from bitdistill_ray.packed.manifest import FORMAT_VERSION, expected_parts

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
    weights = {name: prod(entry.shape) for name, entry in entries.items()}
    bits = sum(entry.spec.bits_per_weight(*entry.shape) * weights[name] for name, entry in entries.items())
    plain = {name: prod(folder.manifest.tensors[name].shape) for name in folder.plain_names}
    sizes = {name: tensor_bytes(folder, name) for name in folder.manifest.tensors}
    embeddings = sum(size for name, size in sizes.items() if not set(EMBEDDINGS).isdisjoint(name.split(".")))
    return PackedSummary(
        path=str(folder.path),
        model_type=str(folder.config.get("model_type")),
        format_version=FORMAT_VERSION,
        specs=dict(Counter(describe(entry.spec) for entry in entries.values())),
        packed_weights=sum(weights.values()),
        bits_per_weight=bits / max(1, sum(weights.values())),
        parameters=sum(weights.values()) + sum(plain.values()),
        bytes=sum(sizes.values()),
        bytes_without_embeddings=sum(sizes.values()) - embeddings,
        subln=len(folder.manifest.subln),
        provenance=folder.provenance,
    )


def tensor_bytes(folder: PackedFolder, name: str) -> int:
    """Stored bytes of one tensor."""
    stored = folder.manifest.tensors[name]
    return prod(stored.shape) * stored.dtype.itemsize


def describe(spec: QuantSpec) -> str:
    """`int2, group of 128, fp16 scales`."""
    shared = f"{spec.granularity} of {spec.group_size}" if spec.group_size else f"per {spec.granularity}"
    activations = f", int{spec.activation_bits} activations" if spec.activation_bits else ""
    return f"{spec.format}, {shared}, {spec.scale_dtype} scales{activations}"


def render(folder: PackedFolder, *, tensors: bool) -> str:
    """The summary for a person; with `tensors` a line for every stored matrix and tensor."""
    summary = summarise(folder)
    lines = [
        f"{summary.path}: packed {summary.model_type}, format version {summary.format_version}, every checksum right",
        *(f"  {count:5} x {spec}" for spec, count in summary.specs.items()),
        f"  bits per weight           {summary.bits_per_weight:.3f} over {summary.packed_weights:,} packed weights",
        f"  parameters                {summary.parameters:,}",
        f"  bytes                     {summary.bytes:,}",
        f"  bytes without embeddings  {summary.bytes_without_embeddings:,}",
        f"  16 bits would take        {2 * summary.parameters:,}",
    ]
    if summary.subln:
        lines.append(f"  SubLN norms               {summary.subln}")
    lines.append("provenance: " + json.dumps(summary.provenance, indent=2, ensure_ascii=False))
    if tensors:
        for name, entry in folder.manifest.packed.items():
            size = sum(tensor_bytes(folder, f"{name}.{part}") for part in expected_parts(entry))
            lines.append(f"{name}  {list(entry.shape)}  {describe(entry.spec)}  {size:,} bytes")
        for name in folder.plain_names:
            stored = folder.manifest.tensors[name]
            lines.append(f"{name}  {list(stored.shape)}  {stored.dtype}  {tensor_bytes(folder, name):,} bytes")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Print what PATH holds; returns the exit status, 2 after an error that the user can mend."""
    from bitdistill_ray.model.sources import resolve

    command = argparse.ArgumentParser(prog="bitdistill inspect", description=__doc__.partition("\n\n")[2])
    command.add_argument("path", metavar="PATH")
    command.add_argument("--json", action="store_true", help="the summary as one JSON object")
    command.add_argument("--tensors", action="store_true", help="a line for every tensor")
    options = command.parse_args(argv)
    try:
        folder = PackedFolder.open(resolve(options.path))
        folder.verify()
    except BitdistillError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(asdict(summarise(folder))) if options.json else render(folder, tensors=options.tensors))
    return 0


if __name__ == "__main__":
    sys.exit(main())
