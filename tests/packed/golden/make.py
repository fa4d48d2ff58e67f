"""python -m tests.packed.golden.make    wrote the golden folders beside this file, each once.

They are a promise to everyone who has packed students on disk: every later reader must read them and give exactly
`expected-*.safetensors`.  So this script is not run again when a reader fails; a new format version gets a new folder.
`student-v2` has what came later: the formats of heads and embeddings, and ternary codes five to a byte.

They cover every format at every granularity that the format allows, ragged last groups, both scale dtypes, int8
activations, all-zero and constant groups, and plain tensors of every stored dtype.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from bitdistill_ray.core import Format, Granularity, PackedWeight, QuantSpec, ScaleDtype
from bitdistill_ray.packed.folder import PackedFolder
from bitdistill_ray.packed.manifest import Layout
from bitdistill_ray.packed.weight import pack
from bitdistill_ray.quant import block_as_group, dequantize, initial_alpha, quantize

HERE = Path(__file__).parent
LATER = (Format.INT4, Format.INT8)
TRITS = (Format.TERNARY, Format.SEQ_TERNARY)
GOLDEN: dict[str, tuple[Format, ...]] = {
    "student-v1": tuple(format for format in Format if format.stored is format and format not in LATER),
    "student-v2": (*LATER, *TRITS),
}
ROWS, COLUMNS = 5, 44  # 44 = 2 groups of 16 and 12 more; no whole number of bytes at 3 bits


def folder_of(golden: str) -> Path:
    return HERE / golden


def layout_of(golden: str) -> Layout:
    return Layout.PLANES if golden == "student-v1" else Layout.TRITS


def expected_of(golden: str) -> Path:
    return HERE / f"expected-{golden.removeprefix('student-')}.safetensors"


def specs(formats: tuple[Format, ...]) -> dict[str, QuantSpec]:
    """Every combination that `QuantSpec` allows, by a name that says it."""
    found = {}
    for format in formats:
        for granularity in Granularity:
            grouped = granularity in (Granularity.GROUP, Granularity.BLOCK)
            if format is Format.NF3 and granularity is not Granularity.GROUP:
                continue
            if granularity is Granularity.BLOCK and format is not Format.TERNARY:
                continue
            found[f"{format}-{granularity}"] = QuantSpec(
                format=format, granularity=granularity, group_size=16 if grouped else None
            )
    for format in (f for f in (Format.TERNARY, Format.INT2, Format.NF3, *LATER) if f in formats):
        found[f"{format}-a8-fp32"] = QuantSpec(
            format=format, group_size=16, activation_bits=8, scale_dtype=ScaleDtype.FP32
        )
    return found


def weight_of(spec: QuantSpec, generator: torch.Generator) -> Tensor:
    """A random matrix with a group of zeros and a constant group; BLOCK gets rows that its blocks do not divide."""
    columns = 40 if spec.granularity is Granularity.BLOCK else COLUMNS
    w_NK = torch.randn(ROWS, columns, generator=generator) * 0.1
    w_NK[1, :16] = 0
    w_NK[2, 16:32] = 0.25
    return w_NK


def plain_tensors() -> dict[str, Tensor]:
    """Tensors that are not packed, one of each dtype."""
    values = torch.linspace(-3, 3, 24).reshape(4, 6)
    return {"embed.weight": values.half(), "norm.weight": values[0].bfloat16(), "gain": values[:, 0].clone()}


def main() -> None:
    """Write those that are not there."""
    for golden, formats in GOLDEN.items():
        if folder_of(golden).exists():
            print(f"{golden} is there: it stays as it is")
        else:
            write(golden, formats)


def write(golden: str, formats: tuple[Format, ...]) -> None:
    generator = torch.Generator().manual_seed(20250101)
    packed: dict[str, PackedWeight] = {}
    expected: dict[str, Tensor] = {}
    for name, spec in specs(formats).items():
        w_NK = weight_of(spec, generator)
        alpha = initial_alpha(w_NK, spec) if spec.format.learns_scale else None
        quantized = block_as_group(quantize(w_NK, spec, alpha=alpha))
        packed[name] = pack(quantized)
        expected[f"{name}.codes"] = quantized.codes_NK
        expected[f"{name}.values"] = dequantize(quantized)
    PackedFolder.write(
        folder_of(golden),
        config={"model_type": "golden", "hidden_size": COLUMNS},
        packed=packed,
        tensors=plain_tensors(),
        files={"notes.txt": b"Not a model: one matrix of every format.\n"},
        provenance={"made_by": "tests/packed/golden/make.py"},
        vocabulary="",
        subln={},
        ternary=layout_of(golden),
    )
    save_file(expected, expected_of(golden))


if __name__ == "__main__":
    main()
