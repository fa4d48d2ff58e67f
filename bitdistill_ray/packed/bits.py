"""Canonical bit packing: codes of 2, 3, 4 or 8 bits as bytes, the same on every machine and for every kernel.

A row of n codes becomes one bit plane after the other, each padded with zero bits to a whole byte:

    plane 0, the low two bits:   code k in bits 2*(k % 4) and 2*(k % 4) + 1 of byte k // 4
    plane 1, the third bit:      code k in bit k % 8 of byte k // 8            (3-bit codes only)

A 4-bit code is a nibble (code k in bits 4*(k % 2) to 4*(k % 2) + 3 of byte k // 2), an 8-bit code a byte.

Planes, instead of a stream of 3-bit fields, keep every code inside one byte: unpacking is a shift and a mask in any
vector width, and the 2-bit plane of a 3-bit weight is read by the same code as a 2-bit weight.  Kernels repack these
bytes to the layout of their instruction set when a weight is loaded; the bytes on disk never depend on one.

    R rows   n codes of a row
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitdistill_ray.errors import PackedError

_PLANES: dict[int, tuple[int, ...]] = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}
"""Bits of a code -> bits of its planes, low bits first."""


def packed_row_bytes(n: int, bits: int) -> int:
    """Bytes of one packed row of `n` codes of `bits` (2, 3, 4 or 8) bits."""
    return sum(_plane_bytes(n, plane_bits) for plane_bits in _planes(bits))


def pack_codes(codes_Rn: Tensor, bits: int) -> Tensor:
    """uint8 codes [R, n], each below 2**bits, to uint8 [R, packed_row_bytes(n, bits)].

    Raises PackedError where the tensor is not two-dimensional uint8 or a code does not fit.
    """
    if codes_Rn.dtype is not torch.uint8 or codes_Rn.ndim != 2:
        raise PackedError("codes", f"{codes_Rn.dtype} {list(codes_Rn.shape)}", "Give uint8 [rows, codes]")
    if codes_Rn.numel() and int(codes_Rn.max()) >= 2**bits:
        raise PackedError("codes", f"code {int(codes_Rn.max())} in {bits} bits", f"Give codes below {2**bits}")
    planes, low = [], 0
    for plane_bits in _planes(bits):
        planes.append(_pack_plane((codes_Rn >> low) & (2**plane_bits - 1), plane_bits))
        low += plane_bits
    return torch.cat(planes, dim=1)


def unpack_codes(packed: Tensor, n: int, bits: int) -> Tensor:
    """Inverse of `pack_codes`: uint8 [R, packed_row_bytes(n, bits)] to uint8 codes [R, n].

    Raises PackedError where the bytes of a row are not exactly those of `n` codes.
    """
    if packed.dtype is not torch.uint8 or packed.ndim != 2 or packed.shape[1] != packed_row_bytes(n, bits):
        raise PackedError("packed codes", f"{packed.dtype} {list(packed.shape)} for {n} codes of {bits} bits",
                          f"Give uint8 [rows, {packed_row_bytes(n, bits)}]")  # fmt: skip
    codes_Rn = torch.zeros(packed.shape[0], n, dtype=torch.uint8, device=packed.device)
    start, low = 0, 0
    for plane_bits in _planes(bits):
        stop = start + _plane_bytes(n, plane_bits)
        codes_Rn |= _unpack_plane(packed[:, start:stop], n, plane_bits) << low
        start, low = stop, low + plane_bits
    return codes_Rn


def _planes(bits: int) -> tuple[int, ...]:
    if bits not in _PLANES:
        raise PackedError("packed codes", f"{bits} bits", "Use 2, 3, 4 or 8")
    return _PLANES[bits]


def _plane_bytes(n: int, plane_bits: int) -> int:
    return -(-n * plane_bits // 8)


def _pack_plane(fields_Rn: Tensor, plane_bits: int) -> Tensor:
    rows, n = fields_Rn.shape
    per_byte = 8 // plane_bits
    fields_Rn = torch.nn.functional.pad(fields_Rn, (0, -n % per_byte))
    fields = fields_Rn.reshape(rows, _plane_bytes(n, plane_bits), per_byte)
    plane: Tensor = fields[:, :, 0].clone()
    for place in range(1, per_byte):
        plane |= fields[:, :, place] << (place * plane_bits)
    return plane


def _unpack_plane(plane: Tensor, n: int, plane_bits: int) -> Tensor:
    shifts = torch.arange(0, 8, plane_bits, dtype=torch.uint8, device=plane.device)
    fields: Tensor = (plane[:, :, None] >> shifts) & (2**plane_bits - 1)
    return fields.flatten(start_dim=1)[:, :n]
