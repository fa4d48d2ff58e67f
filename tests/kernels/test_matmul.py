"""Every format, granularity and instruction set against the quantiser's own dequantised weight.

The reference is `x @ dequantize(q).T` in float64.  Errors are measured against `|x| @ |w|.T`, the size of the numbers
that are summed.  With int8 activations two things are exact and are tested as such: the integers, against numpy, and
the bits of the result, across instruction sets and thread counts.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitdistill_kernels import (
    Weight,
    instruction_sets,
    matmul,
    quantize_activation,
    set_instruction_set,
    set_threads,
    threads,
)
from bitdistill_ray.core import Format, Granularity, QuantSpec, ScaleDtype
from bitdistill_ray.packed.module import kernel_weight
from bitdistill_ray.packed.weight import pack
from bitdistill_ray.quant import QuantizedTensor, dequantize, fake_quantize_activation, initial_alpha, quantize
from bitdistill_ray.quant import quantize_activation as quantize_activation_torch

SETS = instruction_sets()["available"]
FP32_ERROR = 4e-6  # a few hundred fp32 additions
INT8_ERROR = 5e-7  # one multiply-add per group: the sums themselves are exact
NF3_LEVEL_ERROR = 5.4e-4  # int8 activations meet NF3's levels as integers over 191 and 243: .382 as 73/191


@pytest.fixture(autouse=True)
def _restore_settings() -> Iterator[None]:
    chosen, count = instruction_sets()["chosen"], threads()
    yield
    set_instruction_set(chosen)
    set_threads(count)


@st.composite
def specs(draw: st.DrawFn, activation_bits: int | None) -> QuantSpec:
    format = draw(st.sampled_from(Format))
    groups = [Granularity.GROUP] if format is Format.NF3 else [Granularity.TENSOR, Granularity.ROW, Granularity.GROUP]
    granularity = draw(st.sampled_from(groups))
    size = draw(st.sampled_from([8, 12, 16, 32, 100, 128])) if granularity is Granularity.GROUP else None
    dtype = draw(st.sampled_from(ScaleDtype))
    return QuantSpec(
        format=format, granularity=granularity, group_size=size, scale_dtype=dtype, activation_bits=activation_bits
    )


def quantized(spec: QuantSpec, N: int, K: int, seed: int) -> QuantizedTensor:
    w_NK = torch.randn(N, K, generator=torch.Generator().manual_seed(seed))
    return quantize(w_NK, spec, alpha=initial_alpha(w_NK, spec) if spec.format.learns_scale else None)


def relative_error(y_MN: torch.Tensor, x_MK: torch.Tensor, q: QuantizedTensor, bias_N: torch.Tensor) -> float:
    w_NK, x = dequantize(q).double(), x_MK.double()
    size_MN = x.abs() @ w_NK.abs().T + bias_N.double().abs() + 1e-12
    return float(((y_MN.double() - x @ w_NK.T - bias_N.double()).abs() / size_MN).max())


SHAPES = st.tuples(st.integers(1, 27), st.integers(1, 70), st.integers(1, 300))


@given(st.data(), SHAPES, st.integers(0, 2**20))
@settings(max_examples=60, deadline=None)
def test_fp32_activations(data: st.DataObject, shape: tuple[int, int, int], seed: int) -> None:
    M, N, K = shape
    q = quantized(data.draw(specs(activation_bits=None)), N, K, seed)
    generator = torch.Generator().manual_seed(seed)
    x_MK, bias_N = torch.randn(M, K, generator=generator) + 0.5, torch.randn(N, generator=generator)
    weight = kernel_weight(pack(q))
    for name in SETS:
        set_instruction_set(name)
        assert relative_error(weight.matmul(x_MK, bias=bias_N), x_MK, q, bias_N) < FP32_ERROR, name


@given(st.data(), SHAPES, st.integers(0, 2**20))
@settings(max_examples=60, deadline=None)
def test_int8_activations_are_close_and_the_same_bits_everywhere(
    data: st.DataObject, shape: tuple[int, int, int], seed: int
) -> None:
    M, N, K = shape
    spec = data.draw(specs(activation_bits=8))
    q = quantized(spec, N, K, seed)
    generator = torch.Generator().manual_seed(seed)
    x_MK, bias_N = torch.randn(M, K, generator=generator) + 0.5, torch.randn(N, generator=generator)
    weight, results = kernel_weight(pack(q)), []
    for name in SETS:
        set_instruction_set(name)
        results.append(weight.matmul(x_MK, bias=bias_N, activation_bits=8))
        assert torch.equal(results[-1], results[0]), name
    bound = INT8_ERROR + (NF3_LEVEL_ERROR if spec.format is Format.NF3 else 0)
    assert relative_error(results[0], fake_quantize_activation(x_MK, 8), q, bias_N) < bound


LEVELS: dict[Format, tuple[np.ndarray, float]] = {  # integers that the int8 path sums, and what one is worth
    Format.TERNARY: (np.array([-1, 0, 1]), 1.0),
    Format.SEQ2: (np.array([-3, -1, 1, 3]), 0.25),
    Format.SEQ_TERNARY: (np.array([-1, 0, 1]), 2 / 3),
    Format.LSQ3: (np.arange(-4, 4), 1.0),
}


@pytest.mark.parametrize("format", list(LEVELS))
@pytest.mark.parametrize("instruction_set", SETS)
def test_int8_sums_are_exact_integers(format: Format, instruction_set: str) -> None:
    M, N, K = 6, 45, 1003
    random = np.random.default_rng(3)
    levels, worth = LEVELS[format]
    codes_NK = random.integers(0, len(levels), (N, K), dtype=np.uint8)
    x_MK = random.integers(-127, 128, (M, K)).astype(np.float32)
    x_MK[:, 0] = 127  # the scale of every token is exactly 1
    spec = QuantSpec(format=format, granularity=Granularity.ROW, group_size=None, scale_dtype=ScaleDtype.FP32)
    q = QuantizedTensor(spec=spec, shape=(N, K), codes_NK=torch.from_numpy(codes_NK), scale=torch.ones(N, 1))
    set_instruction_set(instruction_set)
    y_MN = kernel_weight(pack(q)).matmul(x_MK, activation_bits=8)
    exact_MN = x_MK.astype(np.int64) @ levels[codes_NK].astype(np.int64).T
    assert np.array_equal(y_MN, exact_MN.astype(np.float32) * np.float32(worth))


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("format", [format for format in Format if format.stored is format])
def test_the_largest_sums_do_not_overflow(format: Format, instruction_set: str) -> None:
    """All codes and activations at one end, on the longest row that is supported: 65,536 inputs."""
    N, K = 2, 65536
    size = K if format is Format.NF3 else None
    granularity = Granularity.GROUP if format is Format.NF3 else Granularity.ROW
    spec = QuantSpec(format=format, granularity=granularity, group_size=size, activation_bits=8)
    codes_NK = torch.full((N, K), format.code_count - 1, dtype=torch.uint8)
    codes_NK[1] = 1 if format is Format.INT8 else 0  # int8 has no code 0
    scale = torch.ones(N, 1, 2) if format is Format.NF3 else torch.ones(N, 1)
    zero = torch.zeros(N, 1, dtype=torch.uint8) if format.has_zero_point else None
    q = QuantizedTensor(spec=spec, shape=(N, K), codes_NK=codes_NK, scale=scale, zero=zero)
    set_instruction_set(instruction_set)
    x_MK = torch.tensor([[3.0], [-3.0]]).expand(2, K).contiguous()
    y_MN = kernel_weight(pack(q)).matmul(x_MK, activation_bits=8)
    torch.testing.assert_close(y_MN.double(), x_MK.double() @ dequantize(q).double().T, rtol=1e-6, atol=0)


@given(st.integers(1, 5), st.integers(1, 200), st.integers(0, 2**20), st.floats(1e-12, 1e30))
@settings(max_examples=50, deadline=None)
def test_activations_are_quantised_as_in_training(M: int, K: int, seed: int, size: float) -> None:
    x_MK = torch.randn(M, K, generator=torch.Generator().manual_seed(seed)) * size
    expected_q, expected_scale = quantize_activation_torch(x_MK, 8)
    for name in SETS:
        set_instruction_set(name)
        q, scale = quantize_activation(x_MK)
        assert torch.equal(q, expected_q)
        assert torch.equal(scale, expected_scale)


def test_halves_are_rounded_to_even() -> None:
    x = np.array([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5]], dtype=np.float32)
    for name in SETS:
        set_instruction_set(name)
        assert quantize_activation(x)[0].tolist() == [[127, 0, 2, 2, 0, -2, -126]]


@pytest.mark.parametrize("activation_bits", [None, 8])
def test_zero_tokens_zero_weights_and_one_by_one(activation_bits: int | None) -> None:
    for format in Format:
        spec = QuantSpec(format=format, group_size=8)
        w_NK = torch.zeros(1, 1)
        q = quantize(w_NK, spec, alpha=torch.ones(1, 1) if format.learns_scale else None)
        weight = kernel_weight(pack(q))
        zero = weight.matmul(torch.zeros(1, 1), activation_bits=activation_bits)
        assert zero.tolist() == [[0.0]]
        assert weight.matmul(torch.zeros(0, 1), activation_bits=activation_bits).shape == (0, 1)
        one = weight.matmul(torch.ones(1, 1), activation_bits=activation_bits)
        torch.testing.assert_close(one, dequantize(q).T, rtol=1e-6, atol=3e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("activation_bits", [None, 8])
def test_a_token_that_is_not_finite_spoils_itself_only(value: float, activation_bits: int | None) -> None:
    weight = kernel_weight(pack(quantized(QuantSpec(format=Format.INT2), 9, 50, 0)))
    x_MK = torch.ones(3, 50)
    x_MK[1, 7] = value
    for name in SETS:
        set_instruction_set(name)
        finite_MN = torch.isfinite(weight.matmul(x_MK, activation_bits=activation_bits))
        assert finite_MN[0].all()
        assert finite_MN[2].all()
        assert not finite_MN[1].any()


def test_the_number_of_threads_changes_nothing() -> None:
    q = quantized(QuantSpec(format=Format.INT3, group_size=64), 500, 320, 1)
    x_MK, weight = torch.randn(19, 320), kernel_weight(pack(q))
    results = []
    for count in (1, 2, 5):
        set_threads(count)
        assert threads() == count
        results.append(weight.matmul(x_MK))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("format", [Format.TERNARY, Format.INT3, Format.NF3])
def test_a_token_does_not_depend_on_the_tokens_beside_it(format: Format) -> None:
    weight = kernel_weight(pack(quantized(QuantSpec(format=format, group_size=64), 40, 200, 1)))
    x_MK = torch.randn(31, 200, generator=torch.Generator().manual_seed(1))
    for name in SETS:
        set_instruction_set(name)
        for bits in (None, 8):
            alone = torch.cat([weight.matmul(x_K[None], activation_bits=bits) for x_K in x_MK])
            assert torch.equal(weight.matmul(x_MK, activation_bits=bits), alone), name


def test_numpy_gives_numpy_and_leading_dimensions_stay() -> None:
    q = quantized(QuantSpec(format=Format.NF3, group_size=16), 11, 40, 2)
    packed = pack(q)
    x = torch.randn(2, 3, 40)
    arguments: dict[str, Any] = {"format": "nf3", "group_size": 16}
    from_numpy = matmul(x.numpy(), packed.codes.numpy(), packed.scales.numpy(), **arguments)
    from_torch = matmul(x, packed.codes, packed.scales, **arguments)
    assert isinstance(from_numpy, np.ndarray)
    assert isinstance(from_torch, torch.Tensor)
    assert from_torch.shape == (2, 3, 11)
    assert np.array_equal(from_numpy, from_torch.numpy())
    weight = Weight.create(packed.codes, packed.scales, shape=(11, 40), **arguments)
    assert weight.nbytes >= packed.codes.nbytes + packed.scales.nbytes
    column = x.transpose(0, 1)  # not contiguous
    assert torch.equal(weight.matmul(column), from_torch.transpose(0, 1))
    out = torch.empty(2, 3, 11)
    assert weight.matmul(x, out=out) is out
    assert torch.equal(out, from_torch)
