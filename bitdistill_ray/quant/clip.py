"""Asymmetric clipping (BitDistiller, section 3.1): where to clip each group's weights before training starts.

Independently for every group g of every output channel, over a grid of factors a, b in {1, .95, ..., .55}:

    min  mean_t ( x_tg . w_g  -  x_tg . Q(clip(w_g, b * min w_g, a * max w_g)) )^2

With H_g = mean_t x_tg x_tg^T that error is exactly d^T H_g d, d = w - Q(clip(w)).  So the calibration activations are
reduced to one small Gram matrix per group as they arrive: every token counts (the authors keep 512), nothing but
K * S numbers is stored, and the cost of the search does not depend on the number of tokens.

Q is `fake_quantize`, on weights in their own dtype, so what is searched is what is trained.  Candidates are tried in
order of how much they clip, and a later one must be strictly better: ties keep the least clipping.

Granularities.  GROUP: as above.  ROW: one range per row; TENSOR: one range for the matrix, and errors summed over what
shares it.  Both use Gram matrices of 128 consecutive inputs and leave out the cross terms between these segments, as
the method does between groups.  BLOCK: one range per block, segments of gcd(block size, K).

Ranges are shaped [R, G] as in `grouping`: [N, G], [N, 1], [1, 1], [1, blocks].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitdistill_ray.core import Granularity, QuantSpec
from bitdistill_ray.errors import ModelError
from bitdistill_ray.quant.base import check_finite, fake_quantize, initial_alpha
from bitdistill_ray.quant.block import block_segment
from bitdistill_ray.quant.grouping import Grouping
from bitdistill_ray.quant.moments import Moments, output_errors

SEGMENT = 128  # inputs of one Gram matrix for ROW and TENSOR


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipGrid:
    """Factors 1, 1 - 1/steps, 1 - 2/steps, ... down to, but not including, 1 - max_shrink."""

    steps: int = 20
    max_shrink: float = 0.5

    def pairs(self) -> tuple[tuple[float, float], ...]:
        """All (low factor, high factor), the least clipping first."""
        shrinks = range(max(1, int(self.steps * self.max_shrink)))
        order = sorted(((low, high) for low in shrinks for high in shrinks), key=lambda pair: (sum(pair), pair))
        return tuple((1 - low / self.steps, 1 - high / self.steps) for low, high in order)


@dataclass(slots=True, kw_only=True, eq=False)
class ClipRange:
    """The best range of every group, in the weight's dtype, and the mean squared output error without and with it."""

    low_RG: Tensor
    high_RG: Tensor
    error_before_RG: Tensor
    error_after_RG: Tensor


class ClipStatistics(Moments):
    """What the search needs to know of a linear layer's inputs: second moments within each segment."""

    def __init__(self, in_features: int, spec: QuantSpec, *, device: torch.device | str = "cpu") -> None:
        super().__init__(in_features, _segment(spec, in_features), device=device)

    @classmethod
    def of(cls, moments: Moments, spec: QuantSpec) -> ClipStatistics:
        """What whole second moments say about the segments."""
        statistics = cls(moments.in_features, spec)
        statistics.take(moments)
        return statistics


@torch.no_grad()
def search_clip(
    w_NK: Tensor,
    statistics: ClipStatistics,
    spec: QuantSpec,
    grid: ClipGrid | None = None,
    *,
    chunk_weights: int = 1 << 20,
    name: str = "weight",
) -> ClipRange:
    """The clipping range of every group that keeps the layer's output closest to that of the unquantised weight.

    Rows and grid points are tried together, `chunk_weights` weights at a time (the working memory is a few times that,
    in float32); TENSOR and BLOCK, whose scales span rows, take the whole matrix once for each grid point.
    Raises ModelError, naming `name`, for weights or activations that are not finite or do not fit each other.
    """
    check_finite(w_NK, name)
    N, K = w_NK.shape
    if statistics.in_features != K or statistics.size != _segment(spec, K):
        what = f"statistics of {statistics.in_features} inputs by {statistics.size}, for {K} by {_segment(spec, K)}"
        raise ModelError(name, what, "Make ClipStatistics with this layer's inputs and this spec")
    grams = tuple(gram_GSS.to(w_NK.device) for gram_GSS in statistics.grams(name))
    factors_P2 = torch.tensor((grid or ClipGrid()).pairs(), device=w_NK.device)
    rows = max(1, min(N, chunk_weights // K)) if _rows_are_independent(spec) else N
    chunks = [_search_rows(chunk_RK, grams, spec, factors_P2, chunk_weights) for chunk_RK in torch.split(w_NK, rows)]
    low_RG, high_RG, before_RG, after_RG = (torch.cat(parts) for parts in zip(*chunks, strict=True))
    return ClipRange(low_RG=low_RG, high_RG=high_RG, error_before_RG=before_RG, error_after_RG=after_RG)


def apply_clip(w_NK: Tensor, ranges: ClipRange, spec: QuantSpec) -> Tensor:
    """The weights clamped to their ranges; dtype stays.  Raises ModelError for ranges of another shape."""
    shape = (w_NK.shape[0], w_NK.shape[1])
    grouping = Grouping.of(spec, shape)
    if tuple(ranges.low_RG.shape) != (grouping.rows, grouping.groups):
        what = f"clip ranges {list(ranges.low_RG.shape)} for {grouping.rows} x {grouping.groups} groups"
        raise ModelError("clip", what, "Search the ranges again for this weight and this spec")
    return _clamp(w_NK, ranges.low_RG.to(w_NK), ranges.high_RG.to(w_NK), grouping, copies=1)


def _search_rows(
    w_NK: Tensor, grams: tuple[Tensor, ...], spec: QuantSpec, factors_P2: Tensor, chunk_weights: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(low, high, error before, error after), [R, G] each, of rows that are searched together."""
    grouping = Grouping.of(spec, (w_NK.shape[0], w_NK.shape[1]))
    limits = [part_RGS.aminmax(dim=-1, keepdim=True) for part_RGS in grouping.split(w_NK)]
    bottom_RG = grouping.join_groups([limit.min for limit in limits]).squeeze(-1).float()
    top_RG = grouping.join_groups([limit.max for limit in limits]).squeeze(-1).float()

    at_once = max(1, chunk_weights // w_NK.numel()) if _rows_are_independent(spec) else 1
    before_RG = best_RG = torch.full_like(top_RG, torch.inf)
    pair_RG = torch.zeros_like(top_RG, dtype=torch.int64)
    for first in range(0, len(factors_P2), at_once):
        low_P11, high_P11 = factors_P2[first : first + at_once, :, None, None].unbind(1)
        low_PRG, high_PRG = (low_P11 * bottom_RG).to(w_NK), (high_P11 * top_RG).to(w_NK)
        candidate_MK = _clamp(w_NK, low_PRG, high_PRG, grouping, copies=len(low_PRG))
        error_PRG = _errors(w_NK, candidate_MK, grams, spec).reshape(low_PRG.shape)
        index_1RG = error_PRG.argmin(dim=0, keepdim=True)  # the first of equals
        lowest_RG = error_PRG.gather(0, index_1RG).squeeze(0)
        better_RG = lowest_RG < best_RG
        best_RG = torch.where(better_RG, lowest_RG, best_RG)
        pair_RG = torch.where(better_RG, index_1RG.squeeze(0) + first, pair_RG)
        if first == 0:
            before_RG = error_PRG[0]  # the pair (1, 1): no clipping
    chosen_RG2 = factors_P2[pair_RG]
    return (chosen_RG2[..., 0] * bottom_RG).to(w_NK), (chosen_RG2[..., 1] * top_RG).to(w_NK), before_RG, best_RG


def _clamp(w_NK: Tensor, low: Tensor, high: Tensor, grouping: Grouping, *, copies: int) -> Tensor:
    """`copies` clamped copies of the matrix, one below the other; the bounds are [copies *] R, G."""
    stacked = Grouping(grouping.rows * copies, grouping.length, grouping.size)
    bounds = zip(grouping.split(w_NK), stacked.split_groups(low), stacked.split_groups(high), strict=True)
    parts = []
    for w_RGS, low_MG1, high_MG1 in bounds:
        low_PRG1, high_PRG1 = torch.unflatten(low_MG1, 0, (copies, -1)), torch.unflatten(high_MG1, 0, (copies, -1))
        parts.append(torch.clamp(w_RGS, low_PRG1, high_PRG1).flatten(0, 1))
    return stacked.join(parts, (w_NK.shape[0] * copies, w_NK.shape[1]))


def _errors(w_NK: Tensor, candidate_MK: Tensor, grams: tuple[Tensor, ...], spec: QuantSpec) -> Tensor:
    """d^T H d of candidates stacked in M = copies * N rows, summed over the weights that share a range."""
    alpha = initial_alpha(candidate_MK, spec) if spec.format.learns_scale else None
    quantized_MK = fake_quantize(candidate_MK, spec, alpha=alpha)
    M, K = candidate_MK.shape
    d_MK = (w_NK.float() - torch.unflatten(quantized_MK.float(), 0, (-1, w_NK.shape[0]))).reshape(M, K)
    segments = []
    for d_MGS, gram_GSS in zip(Grouping(M, K, _segment(spec, K)).split(d_MK), grams, strict=True):
        segments.append(output_errors(d_MGS.transpose(0, 1), gram_GSS).T)
    error_MG = torch.cat(segments, dim=1)
    match spec.granularity:
        case Granularity.GROUP:
            return error_MG
        case Granularity.ROW:
            return error_MG.sum(dim=1, keepdim=True)
        case Granularity.TENSOR:
            return error_MG.sum().reshape(1, 1)
        case Granularity.BLOCK:
            grouping, segment = Grouping.of(spec, (M, K)), _segment(spec, K)
            block = torch.arange(0, M * K, segment, device=error_MG.device) // grouping.size
            return error_MG.new_zeros(grouping.groups).index_add_(0, block, error_MG.flatten()).reshape(1, -1)


def _segment(spec: QuantSpec, in_features: int) -> int:
    """Inputs of one Gram matrix."""
    if spec.granularity is Granularity.BLOCK:
        return block_segment(spec, in_features)
    return min(spec.group_size or SEGMENT, in_features)


def _rows_are_independent(spec: QuantSpec) -> bool:
    return spec.granularity in (Granularity.ROW, Granularity.GROUP)
