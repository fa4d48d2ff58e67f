"""The low-bit products alone: each format and shape for one token, a few (memory-bound) and many (compute-bound).

A product's time is whole: activations are quantised in it, and scales applied.  The weights of a model do not fit in a
cache, so each call takes the next of a pool of matrices that together are larger than one.  On the CPU the compiled
kernels run, in the same windows as the loops that are their limits: reading memory, and int8 dot products on registers.
On a GPU, whatever `PackedLinear` does there.

    M tokens   N out features   K in features
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from bitdistill_ray.bench.limits import Int8Peak, Place, Reader, multiply_rate, turns
from bitdistill_ray.bench.report import Row, Unit
from bitdistill_ray.bench.timing import Function, seconds_per_call
from bitdistill_ray.core import Format, Granularity, PackedWeight, QuantSpec
from bitdistill_ray.errors import ConfigError
from bitdistill_ray.packed.linear import PackedLinear, kernel_weight
from bitdistill_ray.packed.weight import pack
from bitdistill_ray.quant import initial_alpha, quantize

GROUP_SIZE = 128
TOKENS = (1, 4, 128)
MOST_MEMORY_TOKENS = 8  # held to the speed of memory
MOST_MATRICES = 512  # of one pool
DENSE_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

Matrix = Callable[[Tensor], Function]
"""A matrix in memory of its own: given x_MK, the function that multiplies."""


def parse_format(name: str) -> QuantSpec:
    """`FORMAT`, or `FORMAT:a8` and `FORMAT:a16` for other activations than the format usually has.

    Usually: ternary has one scale per tensor and int8 activations, learnable formats have one per row, the others one
    for each group of 128, all with 16- or 32-bit activations.
    Raises ConfigError.
    """
    known, _, activations = name.partition(":")
    if known not in list(Format) or activations not in ("", "a8", "a16"):
        raise ConfigError("--formats", f"{name!r}", f"Give {', '.join(Format)}, perhaps with :a8 or :a16")
    format = Format(known)
    if format is Format.TERNARY:
        spec = QuantSpec(format=format, granularity=Granularity.TENSOR, group_size=None, activation_bits=8)
    elif format.learns_scale:
        spec = QuantSpec(format=format, granularity=Granularity.ROW, group_size=None)
    else:
        spec = QuantSpec(format=format, group_size=GROUP_SIZE)
    return replace(spec, activation_bits=8 if activations == "a8" else None) if activations else spec


def parse_shape(text: str) -> tuple[int, int]:
    """`4096x14336` is N = 4096 out features, K = 14336 in features.  Raises ConfigError."""
    sizes = text.lower().split("x")
    if len(sizes) != 2 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise ConfigError("--shapes", f"{text!r}", "Give out x in features, such as 4096x14336")
    return int(sizes[0]), int(sizes[1])


def measure(
    specs: Sequence[QuantSpec], shapes: Sequence[tuple[int, int]], place: Place, tokens: Sequence[int] = TOKENS
) -> list[Row]:
    """Rows of every format and shape, for each number of tokens."""
    reader = Reader(place)
    peak = None if place.threads is None else Int8Peak(place.threads)
    rows: list[Row] = []
    for N, K in shapes:
        dense_rate = multiply_rate(N, K, place)
        dense = {name: _dense_pool(N, K, dtype, place) for name, dtype in DENSE_DTYPES.items()}
        for spec in specs:
            packed = _random_packed(N, K, spec)
            pools = {"kernel": _packed_pool(packed, place), **dense}
            for M in tokens:
                x_MK = torch.randn(M, K, device=place.device)
                products = {name: turns([multiply(x_MK) for multiply in pool]) for name, pool in pools.items()}
                limits = {**reader.ways, **({} if peak is None else {"peak": peak.work})}
                with torch.inference_mode():
                    times = seconds_per_call({**limits, **products}, device=place.device)
                baseline = min(DENSE_DTYPES, key=lambda name: times[name])
                shared = Row(
                    case=f"matmul {'a8' if spec.activation_bits else 'a16'}",
                    format=spec.format.value,
                    shape=(M, N, K),
                    threads=place.threads,
                    metric="time",
                    unit=Unit.MICROSECONDS,
                    value=times["kernel"] * 1e6,
                    baseline=times[baseline] * 1e6,
                    baseline_is=f"torch linear, the faster of {' and '.join(DENSE_DTYPES)}",
                )
                if M <= MOST_MEMORY_TOKENS:
                    rows += _memory_rows(shared, stored_bytes(packed), reader.best(times), reader.says)
                elif peak is not None and spec.activation_bits:
                    rows += _compute_rows(shared, peak.rate(times["peak"]), peak.says)
                else:
                    rows += _compute_rows(shared, *dense_rate)
    return rows


def stored_bytes(packed: PackedWeight) -> int:
    """Bytes of the canonical format: codes, scales and zero points."""
    return sum(t.nbytes for t in (packed.codes, packed.scales, packed.zeros) if t is not None)


def _memory_rows(time: Row, nbytes: int, bandwidth: float, limit_is: str) -> list[Row]:
    """Time and GB/s of a product whose bytes are all read once."""
    assert time.baseline is not None
    limited = replace(time, limit=nbytes / bandwidth * 1e6, limit_is=f"the packed bytes at the speed of {limit_is}")
    return [
        replace(
            limited,
            metric="bandwidth",
            unit=Unit.GB_S,
            value=nbytes / time.value / 1e3,
            limit=bandwidth / 1e9,
            limit_is=limit_is,
            baseline=None,
            baseline_is=None,
        ),
        limited,
    ]


def _compute_rows(time: Row, rate: float, limit_is: str) -> list[Row]:
    """Time and GOPS of a product of many tokens."""
    assert time.shape is not None
    M, N, K = time.shape
    operations = 2 * M * N * K
    limited = replace(time, limit=operations / rate * 1e6, limit_is=limit_is)
    return [
        replace(
            limited,
            metric="throughput",
            unit=Unit.GOPS,
            value=operations / time.value / 1e3,
            limit=rate / 1e9,
            baseline=None,
            baseline_is=None,
        ),
        limited,
    ]


def _random_packed(N: int, K: int, spec: QuantSpec) -> PackedWeight:
    if spec.group_size is not None:
        spec = replace(spec, group_size=min(spec.group_size, K))
    w_NK = torch.randn(N, K)
    return pack(quantize(w_NK, spec, alpha=initial_alpha(w_NK, spec) if spec.format.learns_scale else None))


def _pool_size(nbytes: int, place: Place) -> int:
    return max(1, min(MOST_MATRICES, -(-place.pool_bytes // nbytes)))


def _packed_pool(packed: PackedWeight, place: Place) -> list[Matrix]:
    """Equal matrices, each in memory of its own."""
    count = _pool_size(stored_bytes(packed), place)
    if place.device.type == "cpu":
        return [_kernel_product(packed) for _ in range(count)]
    return [_linear_product(PackedLinear(packed).to(place.device)) for _ in range(count)]


def _kernel_product(packed: PackedWeight) -> Matrix:
    weight, bits = kernel_weight(packed), packed.spec.activation_bits

    def multiply(x_MK: Tensor) -> Function:
        out_MN = torch.empty(x_MK.shape[0], packed.shape[0])
        return lambda: weight.matmul(x_MK, activation_bits=bits, out=out_MN)

    return multiply


def _linear_product(linear: PackedLinear) -> Matrix:
    return lambda x_MK: partial(linear, x_MK.bfloat16())


def _dense_pool(N: int, K: int, dtype: torch.dtype, place: Place) -> list[Matrix]:
    w_NK = torch.randn(N, K, device=place.device).to(dtype)
    return [_dense_product(w_NK.clone()) for _ in range(_pool_size(w_NK.nbytes, place))]


def _dense_product(w_NK: Tensor) -> Matrix:
    return lambda x_MK: partial(nn.functional.linear, x_MK.to(w_NK.dtype), w_NK)
