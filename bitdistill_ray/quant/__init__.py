"""Low-bit weight and activation quantisers: one implementation for training, evaluation and export.

`base` has the four functions that everyone calls; each format registers itself from its own module, imported here.
"""

from bitdistill_ray.quant import affine, learnable, nf3, symmetric, ternary  # noqa: F401  (they register their formats)
from bitdistill_ray.quant.activation import fake_quantize_activation, quantize_activation
from bitdistill_ray.quant.awq import search_scales
from bitdistill_ray.quant.base import QuantizedTensor, dequantize, fake_quantize, initial_alpha, quantize
from bitdistill_ray.quant.block import block_as_group
from bitdistill_ray.quant.clip import ClipGrid, ClipRange, ClipStatistics, apply_clip, search_clip
from bitdistill_ray.quant.gptq import solve_gptq
from bitdistill_ray.quant.moments import Moments
from bitdistill_ray.quant.report import code_histogram, flip_rate, zero_count

__all__ = [
    "ClipGrid",
    "ClipRange",
    "ClipStatistics",
    "Moments",
    "QuantizedTensor",
    "apply_clip",
    "block_as_group",
    "code_histogram",
    "dequantize",
    "fake_quantize",
    "fake_quantize_activation",
    "flip_rate",
    "initial_alpha",
    "quantize",
    "quantize_activation",
    "search_clip",
    "search_scales",
    "solve_gptq",
    "zero_count",
]
