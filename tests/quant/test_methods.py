"""Values, codes and straight-through gradients against the closed forms of `reference`, in float64."""

import pytest
import torch

from bitdistill_ray.core import Format, Granularity, QuantSpec, Rounding, ScaleDtype
from bitdistill_ray.quant import dequantize, fake_quantize, initial_alpha, quantize
from tests.quant import reference
from tests.quant.cases import PAIRS
from tests.quant.reference import Reference

N, K, SIZE = 6, 40, 16  # groups of 16, 16 and 8


def expected(format: Format, w: list[float], g: list[float], rounding: Rounding, alpha: float) -> Reference:
    match format:
        case Format.TERNARY:
            return reference.ternary(w, g, rounding)
        case Format.INT2 | Format.INT3 | Format.INT4:
            return reference.affine(w, g, rounding, bits=format.code_bits)
        case Format.INT8:
            return reference.symmetric(w, g, rounding, bits=8)
        case Format.NF3:
            return reference.nf3(w, g)
        case Format.SEQ2:
            return reference.seq(w, g, rounding, alpha, N * K, n=2, c=0.5, first=-2)
        case Format.SEQ_TERNARY:
            return reference.seq(w, g, rounding, alpha, N * K, n=1.5, c=0, first=-1)
        case Format.LSQ3:
            return reference.lsq3(w, g, rounding, alpha, N * K)
        case Format.INT2_LSQ | Format.INT3_LSQ:
            bits = 2 if format is Format.INT2_LSQ else 3
            return reference.lsq_affine(w, g, rounding, alpha, N * K, bits=bits)


def spec_of(format: Format, granularity: Granularity, rounding: Rounding = Rounding.HALF_EVEN) -> QuantSpec:
    grouped = granularity in (Granularity.GROUP, Granularity.BLOCK)
    return QuantSpec(format=format, granularity=granularity, group_size=SIZE if grouped else None,
                     scale_dtype=ScaleDtype.FP32, rounding=rounding)  # fmt: skip


def cells(granularity: Granularity) -> list[tuple[slice, slice]]:
    """The rows and columns that share each scale, in the order of the stored scales."""
    if granularity is Granularity.TENSOR:
        return [(slice(0, N), slice(0, K))]
    if granularity is Granularity.ROW:
        return [(slice(n, n + 1), slice(0, K)) for n in range(N)]
    return [(slice(n, n + 1), slice(k, min(k + SIZE, K))) for n in range(N) for k in range(0, K, SIZE)]


@pytest.mark.parametrize(
    ("format", "granularity", "rounding"),
    [
        (format, granularity, rounding)
        for format, granularity in PAIRS
        for rounding in Rounding
        if granularity is not Granularity.BLOCK and (format is not Format.NF3 or rounding is Rounding.HALF_EVEN)
    ],
)
def test_values_codes_and_gradients_are_those_of_the_method(
    format: Format, granularity: Granularity, rounding: Rounding
) -> None:
    torch.manual_seed(0)
    spec = spec_of(format, granularity, rounding)
    w = torch.randn(N, K, dtype=torch.float64, requires_grad=True)
    g = torch.randn(N, K, dtype=torch.float64)
    alpha = None
    if format.learns_scale:  # small enough that many weights are clipped
        alpha = (initial_alpha(w, spec) * torch.empty_like(initial_alpha(w, spec)).uniform_(0.4, 0.8)).requires_grad_()

    output = fake_quantize(w, spec, alpha=alpha)
    output.backward(g)
    q = quantize(w, spec, alpha=alpha)

    assert w.grad is not None
    assert torch.equal(output, dequantize(q))
    alphas = [0.0] * len(cells(granularity)) if alpha is None else alpha.detach().flatten().tolist()
    alpha_grads = [0.0] * len(alphas) if alpha is None or alpha.grad is None else alpha.grad.flatten().tolist()
    for place, alpha_value, alpha_grad in zip(cells(granularity), alphas, alpha_grads, strict=True):
        of = expected(format, w[place].flatten().tolist(), g[place].flatten().tolist(), rounding, alpha_value)
        assert q.codes_NK[place].flatten().tolist() == of.codes
        assert output[place].flatten().tolist() == pytest.approx(of.values, rel=1e-12, abs=1e-15)
        assert w.grad[place].flatten().tolist() == pytest.approx(of.grad_w, rel=1e-9, abs=1e-12)
        assert alpha_grad == pytest.approx(of.grad_alpha, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("format", [Format.INT2, Format.INT3, Format.INT4, Format.NF3])
def test_the_scale_is_not_detached(format: Format) -> None:
    """With a constant output gradient, the extremes of a group receive something else than that constant."""
    torch.manual_seed(1)
    w = torch.randn(1, 16, dtype=torch.float64, requires_grad=True)
    fake_quantize(w, spec_of(format, Granularity.GROUP)).sum().backward()
    assert w.grad is not None
    assert (w.grad[0, w.argmax()] - 1).abs() > 1e-3
    assert (w.grad[0, w.argmin()] - 1).abs() > 1e-3


def test_affine_gradient_agrees_with_autograd_through_the_formula_with_ties() -> None:
    """Equal extremes share the scale's gradient evenly, as autograd does for amax and amin."""
    w = torch.tensor([[-1.0, -1.0, -0.4, 0.1, 0.3, 0.7, 0.9, 0.9]], dtype=torch.float64, requires_grad=True)
    g = torch.tensor([[0.3, -1.0, 0.2, 0.8, -0.5, 0.1, 0.9, -2.0]], dtype=torch.float64)
    fake_quantize(w, spec_of(Format.INT2, Granularity.ROW)).backward(g)

    v = w.detach().clone().requires_grad_()
    s = (v.amax() - v.amin()) / 3
    z = torch.round(-v.amin() / s).detach()
    ratio = v / s
    rounded = ratio + (ratio.round() - ratio).detach()
    ((rounded + z).clamp(0, 3).sub(z) * s).backward(g)
    torch.testing.assert_close(w.grad, v.grad, rtol=1e-12, atol=1e-14)


def test_ternary_blocks_run_over_row_ends() -> None:
    torch.manual_seed(2)
    spec = spec_of(Format.TERNARY, Granularity.BLOCK)
    w = torch.randn(3, 24, dtype=torch.float64)  # 72 weights: four blocks of 16 and one of 8
    q = quantize(w, spec)
    flat, values = w.flatten().tolist(), dequantize(q).flatten().tolist()
    assert q.scale.shape == (5,)
    for start in range(0, 72, 16):
        of = reference.ternary(flat[start : start + 16], flat[start : start + 16], Rounding.HALF_EVEN)
        assert values[start : start + 16] == pytest.approx(of.values, rel=1e-12)


def test_first_alpha_is_the_papers() -> None:
    w = torch.tensor([[0.5, -2.0, 1.0], [0.25, 0.125, 0.0]])
    assert initial_alpha(w, spec_of(Format.SEQ2, Granularity.ROW)).tolist() == [[2.0], [0.25]]
    assert initial_alpha(w, spec_of(Format.SEQ_TERNARY, Granularity.TENSOR)).tolist() == [2.0]
    assert initial_alpha(w, spec_of(Format.LSQ3, Granularity.ROW)).flatten().tolist() == pytest.approx(
        [2 / 3, 0.25 / 3]
    )


def test_gradients_pass_through_the_rounding_of_the_scale() -> None:
    """With a scale stored in 16 bits the closed form holds with the rounded scale."""
    torch.manual_seed(3)
    w = torch.randn(1, 16, dtype=torch.float64, requires_grad=True)
    g = torch.randn(1, 16, dtype=torch.float64)
    spec = QuantSpec(format=Format.INT3, group_size=16, scale_dtype=ScaleDtype.FP16)
    fake_quantize(w, spec).backward(g)
    q = quantize(w, spec)
    assert w.grad is not None
    assert q.zero is not None
    s, z = q.scale.item(), q.zero.item()
    assert s == torch.tensor(s).half().item()
    assert s != (w.max() - w.min()).item() / 7
    free = (w / s).round() + z
    inside = (free >= 0) & (free <= 7)
    routed = (g * (free.clamp(0, 7) - z - inside * w / s)).sum() / 7
    by_hand = g * inside
    by_hand[0, w.argmax()] += routed
    by_hand[0, w.argmin()] -= routed
    torch.testing.assert_close(w.grad, by_hand.detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("learned", "plain"), [(Format.INT2_LSQ, Format.INT2), (Format.INT3_LSQ, Format.INT3)])
def test_a_learned_affine_scale_begins_where_the_plain_format_is(learned: Format, plain: Format) -> None:
    w = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    spec, of = spec_of(learned, Granularity.GROUP), spec_of(plain, Granularity.GROUP)
    begun = quantize(w, spec, alpha=initial_alpha(w, spec))
    q = quantize(w, of)
    assert begun.spec == of
    assert begun.zero is not None
    assert q.zero is not None
    assert torch.equal(begun.scale, q.scale)
    middle = {Format.INT2: (1, 2), Format.INT3: (3, 4)}[plain]
    same = (q.zero >= middle[0]) & (q.zero <= middle[1])
    assert same.float().mean() > (0.99 if plain is Format.INT2 else 0.8)
    assert torch.equal(begun.zero[same], q.zero[same])
    assert int(begun.zero.min()) == middle[0]
    assert int(begun.zero.max()) == middle[1]
    codes, plain_codes = (x.codes_NK.view(64, -1, SIZE)[same] for x in (begun, q))
    assert torch.equal(codes, plain_codes)
