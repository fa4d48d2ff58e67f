"""Specs and weights for the property tests: every format with every granularity that it allows."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from bitdistill_ray.core import Format, Granularity, QuantSpec, Rounding, ScaleDtype
from bitdistill_ray.quant import initial_alpha

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def allowed(format: Format, granularity: Granularity) -> bool:
    if format is Format.NF3:
        return granularity is Granularity.GROUP
    return granularity is not Granularity.BLOCK or format is Format.TERNARY


PAIRS = [(format, granularity) for format in Format for granularity in Granularity if allowed(format, granularity)]


def spec_of(format: Format, granularity: Granularity, size: int = 16, **others: object) -> QuantSpec:
    grouped = granularity in (Granularity.GROUP, Granularity.BLOCK)
    return QuantSpec(format=format, granularity=granularity, group_size=size if grouped else None, **others)  # type: ignore[arg-type]


def alpha_of(w: Tensor, spec: QuantSpec, fraction: float = 0.7) -> Tensor | None:
    """An alpha that clips some weights, for the formats that have one."""
    return initial_alpha(w, spec) * fraction if spec.format.learns_scale else None


@st.composite
def specs(draw: st.DrawFn, formats: tuple[Format, ...] = tuple(Format), **fixed: object) -> QuantSpec:
    format, granularity = draw(st.sampled_from([pair for pair in PAIRS if pair[0] in formats]))
    roundings = [Rounding.HALF_EVEN] if format is Format.NF3 else list(Rounding)
    chosen = {"rounding": draw(st.sampled_from(roundings)), "scale_dtype": draw(st.sampled_from(ScaleDtype))} | fixed
    return spec_of(format, granularity, draw(st.sampled_from([8, 16, 24])), **chosen)


@st.composite
def weights(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = DTYPES, extremes: bool = True) -> Tensor:
    """[N, K] of one of `dtypes`: normal or lattice-valued (many ties); `extremes`: tiny, huge, one-signed too."""
    N, K = draw(st.integers(1, 5)), draw(st.integers(1, 50))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    w = torch.randn(N, K, generator=generator)
    kind = draw(
        st.sampled_from(["normal", "lattice", *(["zeros", "tiny", "huge", "positive", "sparse"] if extremes else [])])
    )
    match kind:
        case "lattice":
            w = (w * 2).round() / 4
        case "zeros":
            w = w * 0
        case "tiny":
            w = w * 1e-7
        case "huge":
            w = w * 1e4
        case "positive":
            w = w.abs() + 0.5
        case "sparse":
            w = w * (torch.rand(N, K, generator=generator) < 0.1)
    return w.to(draw(st.sampled_from(dtypes)))
