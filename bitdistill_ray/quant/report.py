"""What logs say about codes: how often each occurs, how many changed, how many stand for zero."""

from __future__ import annotations

import torch
from torch import Tensor

from bitdistill_ray.quant.base import QuantizedTensor, dequantize


def code_histogram(q: QuantizedTensor) -> Tensor:
    """int64 [code_count]: how many weights have each code."""
    return torch.bincount(q.codes_NK.flatten(), minlength=q.spec.format.code_count)


def flip_rate(codes_a: Tensor, codes_b: Tensor) -> float:
    """Fraction of the codes that differ; about 0.05 % a step is a healthy ternary run (arXiv 2412.04787)."""
    return (codes_a != codes_b).float().mean().item()


def zero_count(q: QuantizedTensor) -> Tensor:
    """int64 scalar, on the codes' device and not read: how many weights are exactly 0 (of normally distributed ones,
    ternary makes about 31 % so)."""
    return (dequantize(q) == 0).sum()
