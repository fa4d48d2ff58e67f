"""int8 activations with one scale per token: absolute maximum (BitNet Distillation, eq 3).

    peak = max(max_k |x_k|, 1e-5)    q = clip(round_half_even(x * (127 / peak)), -128, 127)    x^ = q * (peak / 127)

Both quotients and products are float32, whatever x's dtype: a kernel that wants the same integers multiplies by the
float32 127 / peak and does not divide by the scale.  The gradient is the identity.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bitdistill_ray.errors import ConfigError
from bitdistill_ray.quant.rounding import softened

MIN_PEAK = 1e-5


@torch.no_grad()
def quantize_activation(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """int8 integers shaped like x [..., K], and the float32 scale of each token [..., 1]."""
    rounded, scale = _quantize(x, bits)
    return rounded.to(torch.int8), scale


def fake_quantize_activation(x: Tensor, bits: int, *, strength: Tensor | None = None) -> Tensor:
    """q * scale in x's dtype, with the identity as gradient; equal to the product of `quantize_activation`'s two.

    `strength` is that of `fake_quantize`.
    """
    output: Tensor = _FakeQuantizeActivation.apply(x, bits, strength)  # type: ignore[no-untyped-call]
    return output


class _FakeQuantizeActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int, strength: Tensor | None) -> Tensor:
        rounded, scale = _quantize(x, bits)
        values = rounded.add_(0.0).mul_(scale)  # no negative zero: an int8 has none
        return softened(x.to(values.dtype), values, strength).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0], None, None


def _quantize(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The integers, as float32 (float64 for float64), and the scale."""
    if not 2 <= bits <= 8:
        raise ConfigError("quant.activation_bits", f"{bits} bits do not fit an int8", "Use 8")
    largest = 2 ** (bits - 1) - 1
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    low, high = x.aminmax(dim=-1, keepdim=True)
    peak = high.maximum(-low).clamp(min=MIN_PEAK)
    inverse = torch.full_like(peak, largest) / peak  # of a number and a tensor torch takes the reciprocal, times that
    return (x * inverse).round_().clamp_(-largest - 1, largest), peak / largest
