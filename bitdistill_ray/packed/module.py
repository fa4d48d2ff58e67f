"""What stands for a packed matrix in a model: a module that holds canonical bytes and follows the model's devices.

The bytes are deliberately no buffers: `model.to(torch.bfloat16)` must not round scales that the codes were made with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from bitdistill_kernels import Weight
from bitdistill_ray.core import Granularity, PackedWeight
from bitdistill_ray.packed.weight import check_packed, to_device, unpack
from bitdistill_ray.quant import dequantize


class PackedModule(nn.Module):
    """Holds `packed`; raises PackedError where its tensors do not have the sizes of their spec."""

    def __init__(self, packed: PackedWeight, where: str) -> None:
        super().__init__()
        check_packed(packed, where)
        self.packed = packed
        self._kernel_weight: Weight | None = None

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The [N, K] matrix that the packed bytes stand for."""
        return dequantize(unpack(self.packed)).to(dtype)

    def repacked(self) -> Weight:
        """The compiled kernels' copy of the weight, made at the first call.

        Raises KernelError where the kernels are not built or do not support it.
        """
        if self._kernel_weight is None:
            self._kernel_weight = kernel_weight(self.packed)
        return self._kernel_weight

    def forget(self) -> None:
        """Called when the bytes have gone to another device: what was made of them is made again."""
        self._kernel_weight = None

    def kind(self) -> str:
        """The spec in a few words, for `extra_repr`."""
        spec = self.packed.spec
        return f"{spec.format}, {spec.granularity} {spec.group_size or ''}".rstrip()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = fn(torch.empty(0, device=self.packed.codes.device)).device
        if device != self.packed.codes.device:
            self.packed = to_device(self.packed, device)
            self.forget()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles carry the canonical bytes and repack them when they are first used."""
        return {**self.__dict__, "_kernel_weight": None}


def kernel_weight(packed: PackedWeight) -> Weight:
    """The compiled kernels' own copy of a packed weight on the CPU.

    Raises KernelError where the kernels are not built or do not support it.
    """
    spec = packed.spec
    return Weight.create(
        packed.codes,
        packed.scales,
        packed.zeros,
        format=spec.format.value,
        shape=packed.shape,
        granularity=spec.granularity.value,
        group_size=spec.group_size if spec.granularity is Granularity.GROUP else None,
    )
