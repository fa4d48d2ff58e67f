"""The clipping search against the method done the long way: every candidate, on the activations themselves."""

import pytest
import torch
from torch import Tensor

from bitdistill_ray.core import Format, Granularity, QuantSpec
from bitdistill_ray.errors import ModelError
from bitdistill_ray.quant import (
    ClipGrid,
    ClipRange,
    ClipStatistics,
    apply_clip,
    dequantize,
    initial_alpha,
    quantize,
    search_clip,
)
from bitdistill_ray.quant.clip import SEGMENT
from tests.quant.cases import PAIRS, spec_of

T, N, K, SIZE = 64, 6, 40, 16
GRID = ClipGrid(steps=10, max_shrink=0.4)
FACTORS = (1.0, 0.9, 0.8, 0.7)


def matrices() -> tuple[Tensor, Tensor]:
    """Weights with outliers, and correlated activations of very different sizes."""
    torch.manual_seed(0)
    w = torch.randn(N, K)
    w[torch.rand(N, K) < 0.05] *= 4
    return w, torch.randn(T, K) @ torch.randn(K, K) * torch.linspace(0.1, 3, K)


def searched(w: Tensor, x: Tensor, spec: QuantSpec, **options: int) -> ClipRange:
    statistics = ClipStatistics(w.shape[1], spec)
    for batch in x.split(24):
        statistics.add(batch)
    return search_clip(w, statistics, spec, GRID, **options)


def requantized(w: Tensor, spec: QuantSpec) -> Tensor:
    return dequantize(quantize(w, spec, alpha=initial_alpha(w, spec) if spec.format.learns_scale else None))


@pytest.mark.parametrize("format", list(Format))
def test_group_ranges_are_those_of_an_exhaustive_search_on_the_activations(format: Format) -> None:
    w, x = matrices()
    spec = spec_of(format, Granularity.GROUP, SIZE)
    ranges = searched(w, x, spec)
    for n in range(N):
        for group, start in enumerate(range(0, K, SIZE)):
            w_g, x_g = w[n : n + 1, start : start + SIZE], x[:, start : start + SIZE]
            errors = {}
            for a in FACTORS:
                for b in FACTORS:
                    clipped = w_g.clamp(b * w_g.min(), a * w_g.max())
                    errors[b, a] = ((x_g @ (w_g - requantized(clipped, spec)).T) ** 2).mean().item()
            low, high = ranges.low_RG[n, group].item(), ranges.high_RG[n, group].item()
            chosen = (round(low / w_g.min().item(), 2), round(high / w_g.max().item(), 2))
            assert ranges.error_before_RG[n, group].item() == pytest.approx(errors[1.0, 1.0], rel=1e-3)
            assert ranges.error_after_RG[n, group].item() == pytest.approx(min(errors.values()), rel=1e-3)
            assert errors[chosen] == pytest.approx(min(errors.values()), rel=1e-3)


@pytest.mark.parametrize(("format", "granularity"), PAIRS)
def test_applying_the_ranges_gives_the_error_that_the_search_reported(format: Format, granularity: Granularity) -> None:
    w, x = matrices()
    spec = spec_of(format, granularity, SIZE)
    ranges = searched(w, x, spec)
    before, after = w - requantized(w, spec), w - requantized(apply_clip(w, ranges, spec), spec)
    segment = {Granularity.GROUP: SIZE, Granularity.BLOCK: 8}.get(granularity, SEGMENT)

    def error(d: Tensor) -> float:
        partial = [x[:, k : k + segment] @ d[:, k : k + segment].T for k in range(0, K, segment)]
        return sum((outputs**2).mean(dim=0).sum().item() for outputs in partial)

    assert ranges.error_before_RG.sum().item() == pytest.approx(error(before), rel=1e-3)
    assert ranges.error_after_RG.sum().item() == pytest.approx(error(after), rel=1e-3)
    assert bool((ranges.error_after_RG <= ranges.error_before_RG).all())


@pytest.mark.parametrize("format", [Format.INT2, Format.INT3])
def test_clipping_helps_weights_with_outliers(format: Format) -> None:
    w, x = matrices()
    ranges = searched(w, x, spec_of(format, Granularity.GROUP, SIZE))
    assert ranges.error_after_RG.sum() < 0.9 * ranges.error_before_RG.sum()


@pytest.mark.parametrize("granularity", [Granularity.GROUP, Granularity.ROW])
@pytest.mark.parametrize("chunk_weights", [1, 100, 1000])
def test_the_size_of_the_chunks_changes_nothing(granularity: Granularity, chunk_weights: int) -> None:
    w, x = matrices()
    spec = spec_of(Format.INT2, granularity, SIZE)
    one, many = searched(w, x, spec), searched(w, x, spec, chunk_weights=chunk_weights)
    torch.testing.assert_close(many.error_after_RG, one.error_after_RG, rtol=1e-4, atol=0)
    assert torch.equal(many.low_RG, one.low_RG)
    assert torch.equal(many.high_RG, one.high_RG)


def test_ties_keep_the_least_clipping() -> None:
    """Inputs that are always zero make all errors equal."""
    spec = spec_of(Format.INT2, Granularity.GROUP, SIZE)
    w, _ = matrices()
    ranges = searched(w, torch.zeros(T, K), spec)
    assert torch.equal(apply_clip(w, ranges, spec), w)
    assert ranges.error_after_RG.abs().max() == 0


def test_the_papers_grid() -> None:
    pairs = ClipGrid().pairs()
    assert len(pairs) == len(set(pairs)) == 100
    assert pairs[0] == (1.0, 1.0)
    assert min(low for low, _ in pairs) == pytest.approx(0.55)
    assert min(high for _, high in pairs) == pytest.approx(0.55)


def test_bf16_weights_are_searched_and_clamped_in_bf16() -> None:
    w, x = matrices()
    spec = spec_of(Format.INT2, Granularity.GROUP, SIZE)
    ranges = searched(w.bfloat16(), x.bfloat16(), spec)
    clipped = apply_clip(w.bfloat16(), ranges, spec)
    assert ranges.low_RG.dtype is clipped.dtype is torch.bfloat16
    assert bool((clipped <= w.bfloat16().amax()).all())


def test_what_does_not_fit_is_refused_by_name() -> None:
    spec, (w, x) = spec_of(Format.INT2, Granularity.GROUP, SIZE), matrices()
    statistics = ClipStatistics(K, spec)
    with pytest.raises(ModelError, match="up_proj: no calibration activations"):
        search_clip(w, statistics, spec, name="up_proj")
    with pytest.raises(ModelError, match="39 inputs, not 40"):
        statistics.add(x[:, 1:])
    with pytest.raises(ModelError, match="up_proj: statistics of 40 inputs"):
        search_clip(w[:, 1:], statistics, spec, name="up_proj")
    statistics.add(x * torch.inf)
    with pytest.raises(ModelError, match="not finite"):
        search_clip(w, statistics, spec)
    with pytest.raises(ModelError, match="Search the ranges again"):
        apply_clip(w, searched(w, x, spec), spec_of(Format.INT2, Granularity.ROW))
