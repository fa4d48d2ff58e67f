"""PackedLinear: a linear layer whose weight stays packed, in the place of an `nn.Linear`.

On the CPU it runs the compiled kernels, which read 2 or 3 bits per weight and never form the matrix.  Elsewhere, and
where a gradient is to flow to the input (kernels have none), it dequantises the matrix for the moment of the product:
the reference that the kernels are tested against.  With `kernels=False` it dequantises once and keeps the matrix.

    y = Q(W) A(N(x)) + b        N SubLN, A int8 activations where the spec says so, Q(W) the packed weight
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bitdistill_ray.core import PackedWeight
from bitdistill_ray.packed.module import PackedModule
from bitdistill_ray.quant import fake_quantize_activation


class PackedLinear(PackedModule):
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
        super().__init__(packed, "packed linear")
        self.out_features, self.in_features = packed.shape
        self.norm = norm
        self.kernels = kernels
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
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

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        shape = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{shape}, {self.kind()}, activation_bits={self.packed.spec.activation_bits}"

    def _multiply(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.detach().float()
        bits = self.packed.spec.activation_bits
        output: Tensor = self.repacked().matmul(input.detach().float(), bias=bias, activation_bits=bits)
        return output.to(input.dtype)

    def forget(self) -> None:
        """The kernels' copy and the dense one are made again."""
        super().forget()
        self._dense_NK = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles carry the canonical bytes and make the rest again when it is first used."""
        return {**super().__getstate__(), "_dense_NK": None}
