"""PackedLinear: a linear layer whose weight stays packed, in the place of an `nn.Linear`.

On the CPU it runs the compiled kernels, which read 2 or 3 bits per weight and never form the matrix.  Elsewhere, and
where a gradient is to flow to the input (kernels have none), it dequantises the matrix for the moment of the product:
the reference that the kernels are tested against.  With `kernels=False` it dequantises once and keeps the matrix.

    y = Q(W) A(N(x)) + b        N SubLN, A int8 activations where the spec says so, Q(W) the packed weight

The packed bytes are deliberately no buffers: `model.to(torch.bfloat16)` must not round scales that the codes were made
with.  They follow the module from device to device all the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from bitdistill_kernels import Weight
from bitdistill_ray.core import Granularity, PackedWeight
from bitdistill_ray.packed.weight import check_packed, to_device, unpack
from bitdistill_ray.quant import dequantize, fake_quantize_activation


class PackedLinear(nn.Module):
    """[..., K] to [..., N] in the dtype of the input."""

    bias: nn.Parameter | None
    norm: nn.Module | None

    def __init__(
        self,
        packed: PackedWeight,
        bias: Tensor | None = None,
        *,
        norm: nn.Module | None = None,
        kernels: bool = True,
    ) -> None:
        """`bias` [N]; `norm` is applied to the input first; `kernels` False always takes the reference's way, densely.

        Raises PackedError where the packed tensors do not have the sizes of their spec.
        """
        super().__init__()
        check_packed(packed, "packed linear")
        self.packed = packed
        self.out_features, self.in_features = packed.shape
        self.norm = norm
        self.kernels = kernels
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self._kernel_weight: Weight | None = None
        self._dense_NK: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:
        """Raises KernelError on the CPU where the kernels are not built or do not support the shape."""
        if self.norm is not None:
            input = self.norm(input)
        differentiable = torch.is_grad_enabled() and input.requires_grad
        if self.kernels and input.device.type == "cpu" and not differentiable:
            return self._multiply(input)
        bits = self.packed.spec.activation_bits
        if bits is not None:
            input = fake_quantize_activation(input, bits)
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return nn.functional.linear(input, self._dense(input.dtype), bias)

    def _dense(self, dtype: torch.dtype) -> Tensor:
        if self.kernels:
            return self.dequantized(dtype)
        if self._dense_NK is None or self._dense_NK.dtype is not dtype:
            self._dense_NK = self.dequantized(dtype)
        return self._dense_NK

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The [N, K] matrix that the packed bytes stand for."""
        return dequantize(unpack(self.packed)).to(dtype)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        spec = self.packed.spec
        kind = f"{spec.format}, {spec.granularity} {spec.group_size or ''}".rstrip()
        shape = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{shape}, {kind}, activation_bits={spec.activation_bits}"

    def repacked(self) -> Weight:
        """The compiled kernels' copy of the weight, made at the first call.

        Raises KernelError where the kernels are not built or do not support it.
        """
        if self._kernel_weight is None:
            self._kernel_weight = kernel_weight(self.packed)
        return self._kernel_weight

    def _multiply(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.detach().float()
        bits = self.packed.spec.activation_bits
        output: Tensor = self.repacked().matmul(input.detach().float(), bias=bias, activation_bits=bits)
        return output.to(input.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = fn(torch.empty(0, device=self.packed.codes.device)).device
        if device != self.packed.codes.device:
            self.packed = to_device(self.packed, device)
            self._kernel_weight = self._dense_NK = None
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles carry the canonical bytes and repack them when they are first used."""
        return {**self.__dict__, "_kernel_weight": None, "_dense_NK": None}


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
