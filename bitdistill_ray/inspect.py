"""python -m bitdistill_ray.inspect PATH [--json] [--tensors]    what a packed student holds, after checking every byte.

PATH is a packed folder, local or at a URL.  Bytes are those of the stored tensors; a tied embedding is counted once.
Bits per weight are over the packed linears: codes, scales and zero points, no padding.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from bitdistill_ray.errors import BitdistillError
from bitdistill_ray.packed.folder import PackedFolder
from bitdistill_ray.packed.manifest import expected_parts
from bitdistill_ray.packed.summary import describe, summarise, tensor_bytes


def render(folder: PackedFolder, *, tensors: bool) -> str:
    """The summary for a person; with `tensors` a line for every stored matrix and tensor."""
    summary = summarise(folder)
    lines = [
        f"{summary.path}: packed {summary.model_type}, format version {summary.format_version}, every checksum right",
        *(f"  {count:5} x {spec}" for spec, count in summary.specs.items()),
        f"  bits per weight           {summary.bits_per_weight:.3f} over the packed linears",
        f"  packed weights            {summary.packed_weights:,}",
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
            lines.append(f"{name}  {list(entry.shape)}  {describe(entry)}  {size:,} bytes")
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
