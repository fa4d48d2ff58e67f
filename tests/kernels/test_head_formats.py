"""int4 and int8, single rows, scales per group of an activation, and several weights at once, against numpy.

The formats' bytes are written here by hand, from docs/FORMAT.md and not by the packer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from bitdistill_kernels import (
    Weight,
    instruction_sets,
    matmul_shared,
    quantize_activation,
    set_instruction_set,
)
from bitdistill_ray.core import Format, Granularity, QuantSpec, ScaleDtype
from bitdistill_ray.errors import KernelError
from bitdistill_ray.packed.module import kernel_weight
from bitdistill_ray.packed.weight import pack
from bitdistill_ray.quant import dequantize, initial_alpha, quantize

SETS = instruction_sets()["available"]
FP32_ERROR = 4e-6


@pytest.fixture(autouse=True)
def _restore_settings() -> Iterator[None]:
    chosen = instruction_sets()["chosen"]
    yield
    set_instruction_set(chosen)


@dataclass(frozen=True)
class Matrix:
    """A random weight: the kernels' own, its values, and its integers with what one of them is worth."""

    weight: Weight
    values_NK: NDArray[np.float32]
    integers_NK: NDArray[np.int64]  # code - zero
    scales_NG: NDArray[np.float32]
    group: int  # columns of one


def nibbles(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    padded = np.pad(codes, ((0, 0), (0, codes.shape[1] % 2)))
    return padded[:, ::2] | padded[:, 1::2] << 4


def matrix(format: str, granularity: str, N: int, K: int, group_size: int, dtype: str, seed: int) -> Matrix:
    random = np.random.default_rng(seed)
    size = min(group_size, K) if granularity == "group" else K
    G = -(-K // size)
    rows = 1 if granularity == "tensor" else N
    codes_NK = random.integers(0 if format == "int4" else 1, 16 if format == "int4" else 256, (N, K), dtype=np.uint8)
    scales = (random.random((rows, G)) + 0.01).astype(dtype)
    scales[random.random(scales.shape) < 0.1] = 0  # all-zero groups
    zeros = random.integers(0, 16, (rows, G), dtype=np.uint8) if format == "int4" else np.full((rows, G), 128, np.uint8)
    weight = Weight.create(
        nibbles(codes_NK) if format == "int4" else codes_NK,
        scales,
        nibbles(zeros) if format == "int4" else None,
        format=format,
        shape=(N, K),
        granularity=granularity,
        group_size=group_size,
    )
    group_of_K = np.arange(K) // size
    integers_NK = codes_NK.astype(np.int64) - zeros[:, group_of_K]
    scales_NG = np.broadcast_to(scales.astype(np.float32), (N, G))
    return Matrix(weight, integers_NK.astype(np.float32) * scales_NG[:, group_of_K], integers_NK, scales_NG, size)


matrices = st.builds(
    matrix,
    st.sampled_from(["int4", "int8"]),
    st.sampled_from(["tensor", "row", "group"]),
    st.integers(1, 70),
    st.integers(1, 300),
    st.sampled_from([8, 12, 32, 100, 128]),
    st.sampled_from(["float16", "float32"]),
    st.integers(0, 2**20),
)


@given(matrices, st.integers(1, 27), st.integers(0, 2**20))
@settings(max_examples=40, deadline=None)
def test_fp32_activations(w: Matrix, M: int, seed: int) -> None:
    x_MK = np.random.default_rng(seed).standard_normal((M, w.weight.shape[1]), dtype=np.float32)
    exact_MN = x_MK.astype(np.float64) @ w.values_NK.astype(np.float64).T
    size_MN = np.abs(x_MK).astype(np.float64) @ np.abs(w.values_NK).astype(np.float64).T
    size_MN += np.abs(x_MK).sum(1, keepdims=True) * w.scales_NG.max()  # a zero point is taken off all at once
    for name in SETS:
        set_instruction_set(name)
        assert (np.abs(w.weight.matmul(x_MK) - exact_MN) <= 4 * FP32_ERROR * size_MN).all(), name


@given(matrices, st.integers(1, 27), st.booleans(), st.integers(0, 2**20))
@settings(max_examples=60, deadline=None)
def test_int8_activations_are_the_same_bits_everywhere(w: Matrix, M: int, grouped: bool, seed: int) -> None:
    """The header's formula in numpy: exact integers, float32 operations in the order that it gives."""
    group = w.weight.group_size if grouped else None
    x_MK = np.random.default_rng(seed).standard_normal((M, w.weight.shape[1]), dtype=np.float32) * 3
    q_MK, scale_MG = quantize_activation(x_MK, group=group)
    expected_MN = np.zeros((M, w.weight.shape[0]), np.float32)
    for g, first in enumerate(range(0, x_MK.shape[1], w.group)):
        part = slice(first, first + w.group)
        integer_MN = q_MK[:, part].astype(np.int64) @ w.integers_NK[:, part].T
        step_MN = w.scales_NG[None, :, g] * (np.float32(1) if group is None else scale_MG[:, g, None])
        expected_MN += step_MN * integer_MN.astype(np.float32)
    if group is None:
        expected_MN *= scale_MG
    for name in SETS:
        set_instruction_set(name)
        assert np.array_equal(w.weight.matmul(x_MK, activation_bits=8, activation_group=group), expected_MN), name


@pytest.mark.parametrize("format", [*Format, "int4", "int8"])
@pytest.mark.parametrize("granularity", ["tensor", "row", "group"])
def test_rows_are_the_dequantised_ones(format: str, granularity: str) -> None:
    N, K = 45, 150
    ids = torch.tensor([[44, 0], [7, 7], [31, 32]])
    if format in ("int4", "int8"):
        made = matrix(format, granularity, N, K, 24, "float16", 3)
        weight, values_NK = made.weight, torch.from_numpy(made.values_NK)
    else:
        if format == Format.NF3 and granularity != "group":
            pytest.skip("nf3's scales belong to groups")
        size = 24 if granularity == "group" else None
        spec = QuantSpec(format=Format(format), granularity=Granularity(granularity), group_size=size)
        w_NK = torch.randn(N, K, generator=torch.Generator().manual_seed(1))
        q = quantize(w_NK, spec, alpha=initial_alpha(w_NK, spec) if spec.format.learns_scale else None)
        weight, values_NK = kernel_weight(pack(q)), dequantize(q)
    assert torch.equal(weight.rows(ids), values_NK[ids])
    assert torch.equal(torch.from_numpy(weight.rows(ids.numpy())), values_NK[ids])
    assert weight.rows(ids[:0]).shape == (0, 2, K)
    for bad in (torch.tensor([45]), torch.tensor([-1])):
        with pytest.raises(KernelError, match=r"0\.\.44"):
            weight.rows(bad)
    with pytest.raises(KernelError, match="int64"):
        weight.rows(ids.int())


def test_a_head_as_long_as_a_vocabulary() -> None:
    N, K = 151_936, 40
    w = matrix("int4", "group", N, K, 32, "float16", 5)
    x_MK = np.random.default_rng(1).standard_normal((2, K), dtype=np.float32)
    ids = np.array([0, N // 2, N - 1])
    assert np.array_equal(w.weight.rows(ids), w.values_NK[ids])
    np.testing.assert_allclose(w.weight.matmul(x_MK), x_MK @ w.values_NK.T, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("format", ["nf3", "int2", "ternary", "seq2"])
@pytest.mark.parametrize("M", [1, 4, 9])
def test_a_scale_for_each_group_of_a_token(format: str, M: int) -> None:
    """Closer to fp32 activations than one scale per token where one input is far larger than the others."""
    spec = QuantSpec(format=Format(format), group_size=32, scale_dtype=ScaleDtype.FP32)
    w_NK = torch.randn(50, 200, generator=torch.Generator().manual_seed(2))
    q = quantize(w_NK, spec, alpha=initial_alpha(w_NK, spec) if spec.format.learns_scale else None)
    weight, x_MK = kernel_weight(pack(q)), torch.randn(M, 200, generator=torch.Generator().manual_seed(3))
    x_MK[:, 5] = 300
    exact_MN = x_MK.double() @ dequantize(q).double().T
    results = []
    for name in SETS:
        set_instruction_set(name)
        results.append(weight.matmul(x_MK, activation_bits=8, activation_group=32))
        assert torch.equal(results[-1], results[0]), name
    per_token = weight.matmul(x_MK, activation_bits=8)
    assert 2 * (results[0] - exact_MN).norm() < (per_token - exact_MN).norm()


@pytest.mark.parametrize("bits", [None, 8])
def test_several_weights_at_once_are_as_one_after_the_other(bits: int | None) -> None:
    kinds = [("int4", "group", 70), ("int8", "group", 33), ("int8", "row", 5), ("int4", "tensor", 64)]
    weights = [matrix(format, granularity, N, 100, 24, "float16", N).weight for format, granularity, N in kinds]
    biases = [np.arange(weight.shape[0], dtype=np.float32) for weight in weights]
    for M in (1, 3, 150):
        x_MK = np.random.default_rng(M).standard_normal((M, 100), dtype=np.float32)
        together = matmul_shared(weights, x_MK, biases=biases, activation_bits=bits)
        for weight, bias, y_MN in zip(weights, biases, together, strict=True):
            assert np.array_equal(y_MN, weight.matmul(x_MK, bias=bias, activation_bits=bits))
    assert matmul_shared([], np.zeros((1, 3), np.float32)) == []
    with pytest.raises(KernelError, match="groups of None"):
        matmul_shared(weights, np.zeros((1, 100), np.float32), activation_bits=8, activation_group=24)
    with pytest.raises(KernelError, match="activation_bits=8"):
        weights[0].matmul(np.zeros((1, 100), np.float32), activation_group=24)


def test_what_the_formats_do_not_have_is_refused() -> None:
    codes = np.ones((3, 10), np.uint8)
    codes[2, 9] = 0
    arguments = {"format": "int8", "shape": (3, 10), "granularity": "row"}
    with pytest.raises(KernelError, match="a code that the format does not have"):
        Weight.create(codes, np.ones((3, 1), np.float32), **arguments)  # type: ignore[arg-type]
    with pytest.raises(KernelError, match="int4"):
        Weight.create(codes[:, :5], np.ones((3, 1), np.float32), **{**arguments, "format": "int4"})  # type: ignore[arg-type]
