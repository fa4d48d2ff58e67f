"""BLOCK scales rewritten as GROUP scales, without changing one weight.

BitNet Distillation's "block" runs over the flattened matrix, so a block may begin in one row and end in the next.
Kernels and files know only groups of one row.  Groups of gcd(block size, K) weights never straddle a block or a row:
with the block's scale repeated for each of them, they are the same matrix.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from bitdistill_ray.core import Granularity, QuantSpec
from bitdistill_ray.errors import ConfigError
from bitdistill_ray.quant.base import QuantizedTensor

SMALLEST_GROUP = 8  # of QuantSpec


def block_segment(spec: QuantSpec, in_features: int) -> int:
    """gcd(block size, in_features): the longest run of weights that never leaves a row or a block.

    Raises ConfigError where it is under 8 weights.
    """
    size = math.gcd(spec.group_size or in_features, in_features)
    if size < SMALLEST_GROUP:
        what = f"blocks of {spec.group_size} in rows of {in_features} share only {size} weights"
        raise ConfigError("quant.group_size", what, "Choose a power of two, or quant.granularity=group")
    return size


def block_as_group(q: QuantizedTensor) -> QuantizedTensor:
    """The same matrix with GROUP scales of size gcd(block size, K); other granularities come back as they are.

    Raises ConfigError where that size is under 8.
    """
    if q.spec.granularity is not Granularity.BLOCK:
        return q
    (N, K), B = q.shape, q.spec.group_size or 1
    size = block_segment(q.spec, K)
    first_weight = torch.arange(0, N * K, size, device=q.scale.device)
    return QuantizedTensor(
        spec=replace(q.spec, granularity=Granularity.GROUP, group_size=size),
        shape=q.shape,
        codes_NK=q.codes_NK,
        scale=q.scale[first_weight // B].reshape(N, K // size),
    )
