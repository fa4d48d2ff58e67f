"""One quantised matrix to bytes and back: `pack` and `unpack`, exact inverses.

The quantiser has already rounded its scales to `spec.scale_dtype` and made its codes with the rounded scale, so
packing loses nothing; where a scale would not survive, `pack` refuses instead of changing the weight in silence.

`packed_shapes` is the one statement of how large each tensor of a packed weight is; readers and kernels check against
it before they touch a byte.  Shapes of the scales: [1] for TENSOR, [N, 1] for ROW, [N, G] for GROUP, [N, G, 2] for nf3.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from bitdistill_ray.core import Granularity, PackedWeight, QuantSpec, ScaleDtype
from bitdistill_ray.errors import PackedError
from bitdistill_ray.packed.bits import pack_codes, packed_row_bytes, unpack_codes
from bitdistill_ray.quant import QuantizedTensor

SCALE_DTYPES: dict[ScaleDtype, torch.dtype] = {ScaleDtype.FP16: torch.float16, ScaleDtype.FP32: torch.float32}


class PackedShapes(NamedTuple):
    """Shapes of the tensors of one packed weight; `zeros` is None for formats without zero points."""

    codes: tuple[int, ...]
    scales: tuple[int, ...]
    zeros: tuple[int, ...] | None


def packed_shapes(spec: QuantSpec, shape: tuple[int, int]) -> PackedShapes:
    """Shapes that the packed tensors of an [N, K] matrix must have.

    Raises PackedError for BLOCK, which is stored as GROUP.
    """
    if spec.granularity is Granularity.BLOCK:
        raise PackedError("packed weight", "block scales", "Convert it with quant.block_as_group first")
    N, K = shape
    G, bits = spec.groups(K), spec.format.code_bits
    scales: tuple[int, ...] = (1,) if spec.granularity is Granularity.TENSOR else (N, G)
    if spec.format.scales_per_group > 1:
        scales = (*scales, spec.format.scales_per_group)
    zeros_G = 1 if spec.granularity is Granularity.TENSOR else G
    zeros_N = 1 if spec.granularity is Granularity.TENSOR else N
    zeros = (zeros_N, packed_row_bytes(zeros_G, bits)) if spec.format.has_zero_point else None
    return PackedShapes((N, packed_row_bytes(K, bits)), scales, zeros)


def pack(q: QuantizedTensor) -> PackedWeight:
    """The bytes of a quantised matrix.

    Raises PackedError for BLOCK scales, for a code that the format does not have, and for a scale that
    `spec.scale_dtype` cannot hold exactly.
    """
    spec, bits = q.spec, q.spec.format.code_bits
    shapes = packed_shapes(spec, q.shape)
    if q.codes_NK.numel() and int(q.codes_NK.max()) >= spec.format.code_count:
        raise PackedError("packed weight", f"code {int(q.codes_NK.max())} in {spec.format}",
                          f"Give codes below {spec.format.code_count}")  # fmt: skip
    scales = q.scale.to(SCALE_DTYPES[spec.scale_dtype])
    if not torch.equal(scales.to(q.scale.dtype), q.scale):
        raise PackedError("packed weight", f"scales that {spec.scale_dtype} cannot hold exactly",
                          "Quantise with the same scale_dtype, or set quant.scale_dtype=fp32")  # fmt: skip
    zeros = None
    if q.zero is not None and shapes.zeros is not None:
        zeros = pack_codes(q.zero.reshape(shapes.zeros[0], -1), bits)
    packed = PackedWeight(
        spec=spec, shape=q.shape, codes=pack_codes(q.codes_NK, bits), scales=scales.contiguous(), zeros=zeros
    )
    check_packed(packed, "packed weight")
    return packed


def unpack(packed: PackedWeight) -> QuantizedTensor:
    """Inverse of `pack`: codes uint8 [N, K], scales fp32, zeros uint8.

    Raises PackedError where a tensor's size or dtype is not what the spec and shape promise.
    """
    check_packed(packed, "packed weight")
    spec, bits = packed.spec, packed.spec.format.code_bits
    zero: Tensor | None = None
    if packed.zeros is not None:
        zero = unpack_codes(packed.zeros, packed.scales.shape[-1], bits).reshape(packed.scales.shape)
    return QuantizedTensor(
        spec=spec,
        shape=packed.shape,
        codes_NK=unpack_codes(packed.codes, packed.shape[1], bits),
        scale=packed.scales.to(torch.float32),
        zero=zero,
    )


def check_packed(packed: PackedWeight, where: str) -> None:
    """Raise PackedError, naming `where`, unless every tensor has the dtype and shape of its spec."""
    stored = packed.spec.format.stored
    if stored is not packed.spec.format:
        raise PackedError(where, f"says {packed.spec.format}, which is packed as {stored}", "Export it again")
    shapes = packed_shapes(packed.spec, packed.shape)
    expected = {
        "codes": (packed.codes, torch.uint8, shapes.codes),
        "scales": (packed.scales, SCALE_DTYPES[packed.spec.scale_dtype], shapes.scales),
        "zeros": (packed.zeros, torch.uint8, shapes.zeros),
    }
    for name, (tensor, dtype, shape) in expected.items():
        if tensor is None or shape is None:
            if (tensor is None) != (shape is None):
                what = f"{name} {'missing' if tensor is None else 'present'} in {packed.spec.format}"
                raise PackedError(where, what, "The file was written wrongly: export it again")
        elif tensor.dtype is not dtype or tuple(tensor.shape) != shape:
            raise PackedError(where, f"{name} are {tensor.dtype} {list(tensor.shape)}, not {dtype} {list(shape)}",
                              "The file is damaged or was written wrongly: export it again")  # fmt: skip


def to_device(packed: PackedWeight, device: torch.device | str) -> PackedWeight:
    """The same bytes on `device`."""
    zeros = None if packed.zeros is None else packed.zeros.to(device)
    return replace(packed, codes=packed.codes.to(device), scales=packed.scales.to(device), zeros=zeros)
