"""Weights at the edge: zeros, constants, one sign, exact ties, one weight, short last groups, not finite."""

import pytest
import torch

from bitdistill_ray.core import Format, Granularity, QuantSpec, Rounding, ScaleDtype
from bitdistill_ray.errors import BitdistillError, ConfigError, ModelError
from bitdistill_ray.quant import dequantize, fake_quantize, initial_alpha, quantize
from bitdistill_ray.quant.rounding import round_scale
from tests.quant.cases import PAIRS, alpha_of, spec_of


@pytest.mark.parametrize(("format", "granularity"), PAIRS)
def test_zeros_stay_zeros(format: Format, granularity: Granularity) -> None:
    spec = spec_of(format, granularity)
    w = torch.zeros(3, 40, requires_grad=True)
    output = fake_quantize(w, spec, alpha=alpha_of(w, spec))
    output.sum().backward()
    assert w.grad is not None
    assert bool(w.grad.isfinite().all())
    if format is Format.SEQ2:  # which has no level 0: the smallest is a quarter of the smallest alpha
        assert output.abs().max() <= 1e-5
    else:
        assert torch.equal(output, torch.zeros(3, 40))


@pytest.mark.parametrize("format", [Format.TERNARY, Format.INT2, Format.INT3, Format.NF3])
@pytest.mark.parametrize("value", [0.375, -0.375])
def test_a_constant_group_keeps_its_value(format: Format, value: float) -> None:
    w = torch.full((2, 40), value)
    torch.testing.assert_close(dequantize(quantize(w, spec_of(format, Granularity.GROUP))), w, rtol=1e-3, atol=0)


@pytest.mark.parametrize("format", [Format.INT2, Format.INT3, Format.NF3])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_group_of_one_sign_is_off_by_half_a_step_at_most(format: Format, sign: float) -> None:
    w = sign * torch.linspace(0.5, 1.5, 16).reshape(1, 16)
    q = quantize(w, spec_of(format, Granularity.GROUP))
    widest_step = {Format.INT2: 0.5, Format.INT3: 1.5 / 7, Format.NF3: 1.5 * 0.465}[format]
    assert (dequantize(q) - w).abs().max() <= widest_step / 2 + 1e-3


def test_ties_follow_the_rounding_of_the_spec() -> None:
    ties = torch.tensor([[-3.0, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 4.0]])  # scale 1, zero point 3
    even = dequantize(quantize(ties, spec_of(Format.INT3, Granularity.ROW)))
    away = dequantize(quantize(ties, spec_of(Format.INT3, Granularity.ROW, rounding=Rounding.HALF_AWAY)))
    assert even.tolist() == [[-3, -2, -2, 0, 0, 2, 2, 4]]
    assert away.tolist() == [[-3, -3, -2, -1, 1, 2, 3, 4]]


def test_ternary_ties_follow_the_rounding_of_the_spec() -> None:
    ties = torch.tensor([[0.5, -0.5, 2.0, -1.0, 1.0, 1.0]])  # mean 1
    assert quantize(ties, spec_of(Format.TERNARY, Granularity.TENSOR)).codes_NK.tolist() == [[1, 1, 2, 0, 2, 2]]
    away = spec_of(Format.TERNARY, Granularity.TENSOR, rounding=Rounding.HALF_AWAY)
    assert quantize(ties, away).codes_NK.tolist() == [[2, 0, 2, 0, 2, 2]]


def test_nf3_takes_the_upper_level_on_a_cut() -> None:
    cut = torch.tensor(0.8114928305149078).item()
    w = torch.tensor([[1.0, cut, -1.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    assert quantize(w, spec_of(Format.NF3, Granularity.GROUP, 8)).codes_NK[0, :4].tolist() == [7, 7, 0, 3]


@pytest.mark.parametrize(("format", "granularity"), PAIRS)
@pytest.mark.parametrize("shape", [(1, 1), (7, 1), (1, 7), (2, 17)])
def test_small_matrices(format: Format, granularity: Granularity, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    w, spec = torch.randn(shape), spec_of(format, granularity)
    alpha = alpha_of(w, spec)
    assert torch.equal(fake_quantize(w, spec, alpha=alpha), dequantize(quantize(w, spec, alpha=alpha)))


@pytest.mark.parametrize("format", list(Format))
def test_a_short_last_group_is_quantised_like_a_matrix_of_its_own(format: Format) -> None:
    torch.manual_seed(1)
    w = torch.randn(4, 576)
    whole_spec = QuantSpec(format=format, group_size=128)
    alpha = initial_alpha(w, whole_spec) if format.learns_scale else None
    whole = quantize(w, whole_spec, alpha=alpha)
    last = quantize(w[:, 512:], whole_spec, alpha=None if alpha is None else alpha[:, 4:])
    assert whole.scale.shape[:2] == (4, 5)
    assert torch.equal(whole.codes_NK[:, 512:], last.codes_NK)
    assert torch.equal(whole.scale[:, 4:], last.scale)


@pytest.mark.parametrize("format", list(Format))
@pytest.mark.parametrize("magnitude", [1e-30, 1e30])
def test_any_magnitude_gives_finite_values(format: Format, magnitude: float) -> None:
    torch.manual_seed(2)
    w = torch.randn(4, 64) * magnitude
    for scale_dtype in ScaleDtype:
        spec = QuantSpec(format=format, group_size=32, scale_dtype=scale_dtype)
        q = quantize(w, spec, alpha=alpha_of(w, spec))
        assert bool(dequantize(q).isfinite().all())
        assert bool((q.scale > 0).all())
        if magnitude > 1 and scale_dtype is ScaleDtype.FP32:
            assert (dequantize(q) - w).double().norm() < w.double().norm()


def test_fp16_scales_round_as_a_conversion_to_fp16_does() -> None:
    """All finite fp16 numbers, the mid-points between them (ties) and their neighbours."""
    halves = torch.arange(1, 0x7C00, dtype=torch.int16).view(torch.float16).double()
    ties = ((halves[1:] + halves[:-1]) / 2).float()
    scale = torch.cat([halves.float(), ties, ties.nextafter(torch.tensor(1e9)), ties.nextafter(torch.tensor(0.0))])
    assert torch.equal(round_scale(scale, ScaleDtype.FP16), scale.half().float())
    assert round_scale(torch.tensor([0.0, 1e-30, 1e9, torch.inf]), ScaleDtype.FP16).tolist() == [
        2**-24, 2**-24, 65504, 65504]  # fmt: skip


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name_and_place(value: float) -> None:
    w = torch.zeros(4, 16)
    w[2, 3] = value
    with pytest.raises(ModelError, match=r"layers\.0\.q_proj: 1 of 64 values are not finite, the first at \[2, 3\]"):
        quantize(w, QuantSpec(format=Format.INT2, group_size=16), name="layers.0.q_proj")


@pytest.mark.parametrize(
    ("w", "format", "alpha"),
    [
        (torch.zeros(4), Format.INT2, None),
        (torch.zeros(4, 0), Format.INT2, None),
        (torch.zeros(4, 4, dtype=torch.int64), Format.INT2, None),
        (torch.zeros(4, 4), Format.SEQ2, None),
        (torch.zeros(4, 4), Format.INT2, torch.ones(4, 1)),
        (torch.zeros(4, 4), Format.SEQ2, torch.ones(4, 2)),
    ],
)
def test_what_cannot_be_quantised_is_refused(w: torch.Tensor, format: Format, alpha: torch.Tensor | None) -> None:
    with pytest.raises(BitdistillError):
        quantize(w, QuantSpec(format=format, group_size=16), alpha=alpha)
    with pytest.raises(BitdistillError):
        fake_quantize(w, QuantSpec(format=format, group_size=16), alpha=alpha)


def test_only_learnable_formats_have_a_first_alpha() -> None:
    with pytest.raises(ConfigError, match="no alpha"):
        initial_alpha(torch.ones(2, 2), spec_of(Format.INT2, Granularity.ROW))
