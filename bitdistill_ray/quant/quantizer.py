"""What a format is: the pure functions that `base` needs, and the registry of the formats.

A quantiser works on regular groups `[R, G, S]` (see `grouping`) in float32 or float64, and knows nothing of shapes,
dtypes, packing or autograd.  Its integers come in two guises: an *index*, as the method's formula has it (-1, 0, 1 for
ternary), and a *code*, `index + code_offset`, which counts from 0 and is what gets stored.  `fake_quantize` decodes
indices and `dequantize` decodes codes less the same offset, so both give the same bits.

Add a format with one new module that calls `register`, imported by `bitdistill_ray.quant`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from bitdistill_ray.core import Format, QuantSpec, Rounding, ScaleDtype
from bitdistill_ray.errors import ConfigError
from bitdistill_ray.quant.rounding import MIN_SCALE, round_scale


class Quantizer(ABC):
    """One format's arithmetic.

    identity_gradient   the gradient of the weights is the gradient of the output, so nothing is kept for backward
    low_level           a group's largest value is below where the error of normally distributed weights is least
    """

    identity_gradient: ClassVar[bool] = False
    low_level: ClassVar[bool] = False

    @abstractmethod
    def raw_scale(self, w_RGS: Tensor) -> Tensor:
        """The scales [R, G, C] of these weights before they are rounded; the first alpha of a learnable format."""

    def scale_and_zero(self, w_RGS: Tensor, dtype: ScaleDtype) -> tuple[Tensor, Tensor | None]:
        """The scales as they will be stored, and the zero points [R, G, 1] in w's dtype where the format has them."""
        return round_scale(self.raw_scale(w_RGS), dtype), None

    def learned_scale_and_zero(self, alpha_RG1: Tensor, dtype: ScaleDtype) -> tuple[Tensor, Tensor | None]:
        """The same of a learned alpha; alpha stays above `MIN_SCALE`."""
        return round_scale(alpha_RG1.clamp(min=MIN_SCALE), dtype), None

    @abstractmethod
    def encode(self, w_RGS: Tensor, scale_RGC: Tensor, zero_RG1: Tensor | None, rounding: Rounding) -> Tensor:
        """The index [R, G, S] of every weight, a new tensor."""

    @abstractmethod
    def code_offset(self, zero_RG1: Tensor | None) -> Tensor | float:
        """What turns an index into a code."""

    @abstractmethod
    def decode(self, index_RGS: Tensor, scale_RGC: Tensor) -> Tensor:
        """The values [R, G, S] that the indices stand for; may overwrite `index_RGS`."""

    @abstractmethod
    def gradient(
        self, grad_RGS: Tensor, w_RGS: Tensor, scale_RGC: Tensor, zero_RG1: Tensor | None, rounding: Rounding
    ) -> tuple[Tensor, Tensor | None]:
        """Straight-through gradients of the weights [R, G, S] and, for a learnable format, of alpha [R, G, 1]."""

    def hold(self, w_RGS: Tensor, like_RGS: Tensor, spec: QuantSpec) -> Tensor:
        """`w` changed as little as makes its scales those of `like`; as it is where the scale is a parameter."""
        return w_RGS

    def alpha_gradient_scale(self, weights: int) -> float:
        """By what the gradient of alpha is multiplied, in a matrix of so many weights."""
        return 1.0


_quantizers: dict[Format, Quantizer] = {}


def register(format: Format, quantizer: Quantizer) -> None:
    """Make `quantizer` the one of `format`; called once for each format, at import."""
    _quantizers[format] = quantizer


def quantizer_of(format: Format) -> Quantizer:
    """The registered quantiser of `format`."""
    if format not in _quantizers:
        raise ConfigError("quant.format", f"{format} has no quantiser", f"Use one of {', '.join(sorted(_quantizers))}")
    return _quantizers[format]
