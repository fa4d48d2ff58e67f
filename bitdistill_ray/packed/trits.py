"""Ternary codes five to a byte: 1.6 bits a weight in the file, where the 2-bit plane takes 2.

    byte = c_0 + 3 c_1 + 9 c_2 + 27 c_3 + 81 c_4        code k of a row is c_(k mod 5) of byte k // 5

A byte has 243 values; what is beyond them, and what is not 0 behind the last code, was never written and is refused.
Only files hold trits: a reader makes the canonical 2-bit plane of them, so nothing behind it knows.

    R rows   n codes of a row
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitdistill_ray.errors import PackedError

PER_BYTE = 5
VALUES = 3**PER_BYTE


def trit_row_bytes(n: int) -> int:
    """Bytes of one row of `n` ternary codes."""
    return -(-n // PER_BYTE)


def pack_trits(codes_Rn: Tensor) -> Tensor:
    """uint8 codes [R, n], each 0, 1 or 2, to uint8 [R, trit_row_bytes(n)].

    Raises PackedError for a code that is none of these.
    """
    if codes_Rn.numel() and int(codes_Rn.max()) > 2:
        raise PackedError("codes", f"code {int(codes_Rn.max())} is no trit", "Store formats of three codes as trits")
    whole = torch.nn.functional.pad(codes_Rn, (0, -codes_Rn.shape[1] % PER_BYTE))
    fields = whole.reshape(len(codes_Rn), trit_row_bytes(codes_Rn.shape[1]), PER_BYTE)
    packed: Tensor = (fields * _powers(codes_Rn.device)).sum(dim=-1, dtype=torch.uint8)
    return packed


def unpack_trits(packed: Tensor, n: int) -> Tensor:
    """Inverse of `pack_trits`: uint8 [R, trit_row_bytes(n)] to uint8 codes [R, n].

    Raises PackedError where the bytes are not those of rows of `n` ternary codes.
    """
    if packed.dtype is not torch.uint8 or packed.ndim != 2 or packed.shape[1] != trit_row_bytes(n):
        raise PackedError("trits", f"{packed.dtype} {list(packed.shape)} for {n} codes",
                          f"Give uint8 [rows, {trit_row_bytes(n)}]")  # fmt: skip
    values = torch.arange(VALUES, dtype=torch.uint8, device=packed.device)[:, None]
    table = values // _powers(packed.device) % 3
    if packed.numel() and int(packed.max()) >= VALUES:
        raise PackedError("trits", f"byte {int(packed.max())}, and five trits are at most {VALUES - 1}",
                          "The file is damaged: copy it again")  # fmt: skip
    codes: Tensor = table[packed.int()].flatten(start_dim=1)
    if bool(codes[:, n:].any()):
        raise PackedError("trits", "a code behind the end of a row", "The file is damaged: copy it again")
    return codes[:, :n].contiguous()


def _powers(device: torch.device) -> Tensor:
    return torch.tensor([3**i for i in range(PER_BYTE)], dtype=torch.uint8, device=device)
