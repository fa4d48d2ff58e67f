"""What holds for all weights: fake and real agree bit for bit, codes in range, scale equivariance, idempotence.

Idempotence, which is not the same for all formats (quantising what was quantised):
- nf3: codes and scales come back, always: the extreme weight has level +-1.
- ternary: codes come back; the scale does not (it shrinks by the fraction of non-zeros).
- int2, int3: codes come back where a group used its first and its last code; where rounding left the last one unused
  (an extreme weight half-way between codes) the range shrinks and codes move.
- seq2, seq-ternary, lsq3: codes come back with the same alpha; a new `initial_alpha` is another quantiser.
"""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitdistill_ray.core import Format, Granularity, QuantSpec, ScaleDtype
from bitdistill_ray.quant import dequantize, fake_quantize, quantize
from tests.quant.cases import alpha_of, spec_of, specs, weights

quick = settings(deadline=None, max_examples=50)
thorough = settings(deadline=None, max_examples=200)

LEARNABLE = (Format.SEQ2, Format.SEQ_TERNARY, Format.LSQ3, Format.INT2_LSQ, Format.INT3_LSQ)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype is b.dtype and torch.equal(a, b) and torch.equal(a.signbit(), b.signbit())


@given(weights(dtypes=(torch.float32, torch.bfloat16, torch.float16, torch.float64)), specs())
@thorough
def test_fake_quantise_is_the_real_path_bit_for_bit(w: Tensor, spec: QuantSpec) -> None:
    alpha = alpha_of(w, spec)
    q = quantize(w, spec, alpha=alpha)
    output = fake_quantize(w, spec, alpha=alpha)
    assert same_bits(output, dequantize(q).to(w.dtype))
    assert output.shape == w.shape


@given(weights(), specs())
@quick
def test_codes_scales_and_zeros_are_of_the_promised_range_shape_and_dtype(w: Tensor, spec: QuantSpec) -> None:
    q = quantize(w, spec, alpha=alpha_of(w, spec))
    N, K = w.shape
    shape: tuple[int, ...] = (N, spec.groups(K))
    if spec.granularity is Granularity.TENSOR:
        shape = (1,)
    elif spec.granularity is Granularity.BLOCK:
        assert spec.group_size is not None
        shape = (-(-N * K // spec.group_size),)
    assert q.codes_NK.dtype is torch.uint8
    assert q.codes_NK.shape == w.shape
    assert int(q.codes_NK.max()) < spec.format.code_count
    assert q.scale.shape == ((*shape, 2) if spec.format is Format.NF3 else shape)
    assert bool((q.scale > 0).all())
    assert bool(q.scale.isfinite().all())
    assert (q.zero is not None) == spec.format.has_zero_point
    if q.zero is not None:
        assert q.zero.dtype is torch.uint8
        assert q.zero.shape == shape
        assert int(q.zero.max()) < spec.format.code_count


@given(weights(), specs(scale_dtype=ScaleDtype.FP16))
@quick
def test_a_16_bit_scale_is_stored_without_loss(w: Tensor, spec: QuantSpec) -> None:
    scale = quantize(w, spec, alpha=alpha_of(w, spec)).scale
    assert torch.equal(scale.to(torch.float16).to(scale.dtype), scale)


@given(weights(dtypes=(torch.float32,), extremes=False), specs(), st.sampled_from([0.125, 0.5, 2.0, 8.0]))
@quick
def test_scaling_weights_by_a_power_of_two_scales_the_scales_and_keeps_the_codes(
    w: Tensor, spec: QuantSpec, factor: float
) -> None:
    w = torch.where(w == 0, 0.25, w)  # keeps all scales far above the floor and out of fp16's subnormals
    alpha = alpha_of(w, spec)
    small, large = (
        quantize(w, spec, alpha=alpha),
        quantize(w * factor, spec, alpha=None if alpha is None else alpha * factor),
    )
    assert torch.equal(small.codes_NK, large.codes_NK)
    owned = small.scale > 1e-4  # of one sign only: nf3's other scale is the floor
    assert torch.equal(large.scale[owned], small.scale[owned] * factor)


@given(weights(), specs(formats=(Format.NF3,)))
@quick
def test_nf3_is_idempotent(w: Tensor, spec: QuantSpec) -> None:
    first = quantize(w, spec)
    again = quantize(dequantize(first), spec)
    assert torch.equal(again.codes_NK, first.codes_NK)
    owned = first.scale > 1e-4
    assert torch.equal(again.scale[owned], first.scale[owned])
    assert torch.equal(quantize(fake_quantize(w, spec), spec).codes_NK, first.codes_NK)


@given(weights(), specs(formats=(Format.TERNARY,)))
@quick
def test_ternary_codes_are_idempotent_and_scales_never_grow(w: Tensor, spec: QuantSpec) -> None:
    first = quantize(w, spec)
    again = quantize(dequantize(first), spec)
    assert torch.equal(again.codes_NK, first.codes_NK)
    assert bool((again.scale <= first.scale * (1 + 2**-10)).all())
    assert torch.equal(quantize(fake_quantize(w, spec), spec).codes_NK, first.codes_NK)


def test_ternary_twice_shrinks_the_scale_by_the_fraction_of_nonzeros() -> None:
    torch.manual_seed(0)
    spec = spec_of(Format.TERNARY, Granularity.TENSOR, scale_dtype=ScaleDtype.FP32)
    first = quantize(torch.randn(64, 64), spec)
    again = quantize(dequantize(first), spec)
    nonzero = (first.codes_NK != 1).float().mean()
    torch.testing.assert_close(again.scale, first.scale * nonzero)
    assert 0.65 < nonzero < 0.72


@given(weights(), specs(formats=(Format.INT2, Format.INT3)))
@quick
def test_affine_codes_are_idempotent_where_both_ends_are_used(w: Tensor, spec: QuantSpec) -> None:
    first = quantize(w, spec)
    again, in_dtype = quantize(dequantize(first), spec), quantize(fake_quantize(w, spec), spec)
    assert first.zero is not None
    top = spec.format.code_count - 1
    size = spec.group_size or w.shape[1]
    N, K = w.shape
    if spec.granularity is Granularity.TENSOR:
        cells = [(slice(0, N), slice(0, K), 0)]
    else:
        cells = [(slice(n, n + 1), slice(k, min(k + size, K)), n * spec.groups(K) + k // size)
                 for n in range(N) for k in range(0, K, size)]  # fmt: skip
    for rows, columns, group in cells:
        codes, zero = first.codes_NK[rows, columns], int(first.zero.flatten()[group])
        ends_used = (bool((codes == 0).any()) or zero == 0) and (bool((codes == top).any()) or zero == top)
        if ends_used:  # zero itself is always an end of the range of a group of one sign
            assert torch.equal(again.codes_NK[rows, columns], codes)
            assert torch.equal(in_dtype.codes_NK[rows, columns], codes)


def test_affine_is_not_idempotent_where_the_last_code_stays_unused() -> None:
    """Scale 1, zero point 0, and 2.5 rounds to even: the range of the second time is 2, and its scale 2/3."""
    w = torch.tensor([[-0.5, 2.5, 1.5, 0.0, 0.0, 0.0, 0.0, 1.0]])
    spec = spec_of(Format.INT2, Granularity.ROW)
    first = quantize(w, spec)
    assert first.codes_NK.tolist() == [[0, 2, 2, 0, 0, 0, 0, 1]]
    assert quantize(dequantize(first), spec).codes_NK.tolist() == [[0, 3, 3, 0, 0, 0, 0, 2]]


@given(weights(), specs(formats=LEARNABLE))
@quick
def test_learnable_codes_are_idempotent_with_the_same_alpha(w: Tensor, spec: QuantSpec) -> None:
    alpha = alpha_of(w, spec)
    first = quantize(w, spec, alpha=alpha)
    assert torch.equal(quantize(dequantize(first), spec, alpha=alpha).codes_NK, first.codes_NK)


@given(weights(), specs(), st.integers(0, 2**32 - 1))
@quick
def test_gradients_are_finite_and_have_the_dtype_of_what_they_belong_to(w: Tensor, spec: QuantSpec, seed: int) -> None:
    torch.manual_seed(seed)
    w = w.requires_grad_()
    alpha = alpha_of(w.detach(), spec)
    if alpha is not None:
        alpha = alpha.to(w.dtype).requires_grad_()
    fake_quantize(w, spec, alpha=alpha).backward(torch.randn(w.shape).to(w.dtype))
    for tensor in (w, alpha):
        if tensor is not None:
            assert tensor.grad is not None
            assert tensor.grad.dtype is w.dtype
            assert bool(tensor.grad.isfinite().all())


@given(weights(), specs(), st.integers(0, 2**32 - 1), st.floats(0, 1, width=32))
@quick
def test_part_of_the_quantisation_is_that_part_of_values_and_gradients(
    w: Tensor, spec: QuantSpec, seed: int, strength: float
) -> None:
    """w + s (Q(w) - w), its ends bit for bit, against the mixture that autograd makes."""
    torch.manual_seed(seed)
    w, g = w.requires_grad_(), torch.randn(w.shape).to(w.dtype)
    alpha = alpha_of(w.detach(), spec)
    inputs = [w] if alpha is None else [w, alpha.requires_grad_()]
    whole = fake_quantize(w, spec, alpha=alpha)
    ends = [fake_quantize(w, spec, alpha=alpha, strength=torch.tensor(end)) for end in (0.0, 1.0)]
    assert torch.equal(ends[0], w)
    assert torch.equal(ends[1], whole)
    found = fake_quantize(w, spec, alpha=alpha, strength=torch.tensor(strength))
    expected = w.float() + strength * (whole.float() - w.float())
    near = {"rtol": 2e-2, "atol": 1e-3} if w.dtype is torch.bfloat16 else {"rtol": 1e-3, "atol": 1e-5}
    torch.testing.assert_close(found.float(), expected, **near)
    gradients = [
        torch.autograd.grad(y, inputs, g.to(y.dtype), allow_unused=True) for y in (found, expected.to(w.dtype))
    ]
    for grad, mixed in zip(*gradients, strict=True):
        assert grad.dtype is mixed.dtype
        scale = float(max(mixed.abs().max(), g.abs().max())) + 1e-6  # autograd rounds g and s g, and takes them apart
        torch.testing.assert_close(grad.float(), mixed.float(), rtol=5e-2, atol=2e-2 * scale)
