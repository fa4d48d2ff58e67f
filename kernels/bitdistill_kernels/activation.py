"""The int8 activations of a product with `activation_bits=8`."""

from __future__ import annotations

import math

from bitdistill_kernels.buffers import ArrayT, address_of, buffer, empty_like
from bitdistill_kernels.library import MAX_COLUMNS, check, library
from bitdistill_ray.errors import KernelError


def quantize_activation(x: ArrayT, *, group: int | None = None) -> tuple[ArrayT, ArrayT]:
    """float32 [..., K] to int8 [..., K] and float32 scales [..., 1], or [..., G] for groups of `group` inputs.

        peak = max(max|x|, 1e-5)    q = clamp(round half even(x * (127 / peak)), -128, 127)    scale = peak / 127

    in float32, over a token or a group of it: without groups the integers of `bitdistill_ray.quant`'s function of this
    name.  A token or group with a NaN or an infinity gets the scale NaN.
    Raises KernelError for another dtype or K or `group` out of range.
    """
    given = buffer(x, "x", ("float32",))
    if not given.shape:
        raise KernelError("x", "a scalar", "Give [..., K]")
    if group is not None and group < 1:
        raise KernelError("group", f"{group}", "Give the number of inputs that share a scale, or None for all")
    K = given.shape[-1]
    q = empty_like(x, given.shape, "int8")
    scale = empty_like(x, (*given.shape[:-1], 1 if group is None else -(-K // group)), "float32")
    status = library().bdk_quantize_activation(
        given.address, math.prod(given.shape[:-1]), K, group or 0, address_of(q), address_of(scale)
    )
    check(status, "x", f"shape {list(given.shape)}", f"Give [..., K] with K in 1..{MAX_COLUMNS}")
    return q, scale
