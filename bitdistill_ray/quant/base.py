"""`quantize`, `dequantize`, `fake_quantize`, `initial_alpha`: the quantisers as everyone else sees them.

One implementation makes the codes, so a weight that is trained, evaluated and exported is the same weight:
`fake_quantize(w) == dequantize(quantize(w)).to(w.dtype)` bit for bit.  Three things make it so.  The arithmetic is
float32 whatever the weight's dtype (float64 stays float64, for gradient checks).  The scale is rounded to
`spec.scale_dtype` *before* it divides anything, so packing loses nothing; the gradient passes through that rounding.
And training and export call the same `encode` and `decode` of the same registered quantiser.

Backward keeps the weight (which is alive anyway) and the scales, and recomputes the rest: no tensor of the matrix's
size outlives the forward pass.  Nothing waits for the device or branches on data, so torch.compile takes it whole.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bitdistill_ray.core import Granularity, QuantSpec
from bitdistill_ray.errors import ConfigError, ModelError
from bitdistill_ray.quant.grouping import Grouping
from bitdistill_ray.quant.quantizer import Quantizer, quantizer_of
from bitdistill_ray.quant.rounding import softened


@dataclass(slots=True, kw_only=True, eq=False)
class QuantizedTensor:
    """A quantised [N, K] matrix, not yet packed.

    codes_NK  uint8, 0 .. spec.format.code_count - 1
    scale     float32 (float64 for a float64 weight), with values that spec.scale_dtype stores exactly:
              [1] TENSOR, [N, 1] ROW, [N, G] GROUP, [ceil(N*K / group_size)] BLOCK; nf3: [N, G, 2] (positive, negative)
    zero      uint8 shaped like scale, for formats with zero points
    """

    spec: QuantSpec
    shape: tuple[int, int]
    codes_NK: Tensor
    scale: Tensor
    zero: Tensor | None = None


@torch.no_grad()
def quantize(
    w_NK: Tensor, spec: QuantSpec, *, alpha: Tensor | None = None, name: str = "weight", known_finite: bool = False
) -> QuantizedTensor:
    """The codes and scales of a matrix in its `stored` format; `alpha`, shaped like the scales, where it is learned.

    `known_finite` leaves out the look at its values, which waits for the device.
    Raises ModelError, naming `name`, for a weight that is not a matrix or not finite, and for a wrong alpha.
    """
    if not known_finite:
        check_finite(w_NK, name)
    grouping, quantizer, alphas = _prepare(w_NK, spec, alpha, name)
    codes, scales, zeros = [], [], []
    for part_RGS, alpha_RG1 in zip(grouping.split(w_NK), alphas, strict=True):
        w_RGS = part_RGS.to(_compute_dtype(part_RGS))
        scale_RGC, zero_RG1 = _scale_and_zero(quantizer, w_RGS, alpha_RG1, spec)
        index_RGS = quantizer.encode(w_RGS, scale_RGC, zero_RG1, spec.rounding)
        codes.append((index_RGS + quantizer.code_offset(zero_RG1)).to(torch.uint8))
        scales.append(scale_RGC)
        if zero_RG1 is not None:
            zeros.append(zero_RG1.to(torch.uint8))
    shape = (w_NK.shape[0], w_NK.shape[1])
    return QuantizedTensor(
        spec=replace(spec, format=spec.format.stored),
        shape=shape,
        codes_NK=grouping.join(codes, shape),
        scale=_stored(grouping.join_groups(scales), spec),
        zero=_stored(grouping.join_groups(zeros), spec) if zeros else None,
    )


@torch.no_grad()
def dequantize(q: QuantizedTensor) -> Tensor:
    """The [N, K] values that the codes stand for, float32 (float64 where the scale is)."""
    grouping, quantizer = Grouping.of(q.spec, q.shape), quantizer_of(q.spec.format)
    dtype = torch.promote_types(q.scale.dtype, torch.float32)
    codes, scales = grouping.split(q.codes_NK), grouping.split_groups(q.scale.to(dtype))
    zeros = (None,) * len(codes) if q.zero is None else grouping.split_groups(q.zero.to(dtype))
    values = [
        quantizer.decode(code_RGS.to(dtype).sub_(quantizer.code_offset(zero_RG1)), scale_RGC)
        for code_RGS, scale_RGC, zero_RG1 in zip(codes, scales, zeros, strict=True)
    ]
    return grouping.join(values, q.shape)


def fake_quantize(
    w_NK: Tensor, spec: QuantSpec, *, alpha: Tensor | None = None, strength: Tensor | None = None
) -> Tensor:
    """The quantised values in w's dtype, with the method's straight-through gradients for w and alpha.

    Equal to `dequantize(quantize(w, spec, alpha=alpha)).to(w.dtype)` bit for bit.  Weights that are not finite give
    results that are not; `quantize` refuses them.

    strength   scalar lambda in [0, 1]: w + lambda (Q(w) - w), and the gradient of that; w itself at 0, Q(w) at 1, both
               bit for bit.  None is 1
    """
    grouping, quantizer, alphas = _prepare(w_NK, spec, alpha, "weight")
    gain = quantizer.alpha_gradient_scale(w_NK.numel())
    parts = [
        _FakeQuantize.apply(part_RGS, alpha_RG1, strength, quantizer, spec, gain)  # type: ignore[no-untyped-call]
        for part_RGS, alpha_RG1 in zip(grouping.split(w_NK), alphas, strict=True)
    ]
    return grouping.join(parts, (w_NK.shape[0], w_NK.shape[1]))


@torch.no_grad()
def initial_alpha(w_NK: Tensor, spec: QuantSpec) -> Tensor:
    """The alpha with which a learnable format starts, float32 and shaped like the scales: [1], [N, 1] or [N, G].

    Raises ConfigError for a format whose scale is a statistic of the weights.
    """
    if not spec.format.learns_scale:
        raise ConfigError("quant.format", f"{spec.format} has no alpha to learn", "Call initial_alpha for seq and lsq")
    grouping, quantizer = Grouping.of(spec, (w_NK.shape[0], w_NK.shape[1])), quantizer_of(spec.format)
    scales = [quantizer.raw_scale(part_RGS.to(_compute_dtype(part_RGS))) for part_RGS in grouping.split(w_NK)]
    return _stored(grouping.join_groups(scales), spec)


@torch.no_grad()
def scales_of(w_NK: Tensor, spec: QuantSpec, *, alpha: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Of every weight, the scales [N, K, C] and, where the format has them, the zero points [N, K, 1] of its group."""
    grouping, quantizer, alphas = _prepare(w_NK, spec, alpha, "weight")
    parts = [
        (part_RGS.shape[-1], *_scale_and_zero(quantizer, part_RGS.to(_compute_dtype(part_RGS)), alpha_RG1, spec))
        for part_RGS, alpha_RG1 in zip(grouping.split(w_NK), alphas, strict=True)
    ]
    shape = (w_NK.shape[0], w_NK.shape[1])

    def spread(per_group: list[tuple[int, Tensor]]) -> Tensor:
        channels = range(per_group[0][1].shape[-1])
        maps = [[x_RGC[..., c, None].expand(-1, -1, S) for S, x_RGC in per_group] for c in channels]
        return torch.stack([grouping.join(parts_RGS, shape) for parts_RGS in maps], dim=-1)

    scale_NKC = spread([(S, scale_RGC) for S, scale_RGC, _ in parts])
    zeros = [(S, zero_RG1) for S, _, zero_RG1 in parts if zero_RG1 is not None]
    return scale_NKC, spread(zeros) if zeros else None


def check_finite(w: Tensor, name: str) -> None:
    """Raise ModelError, with a count and the first place, where a tensor is not finite; waits for the device."""
    finite = torch.isfinite(w)
    if not bool(finite.all()):
        places = (~finite).nonzero()
        what = f"{len(places)} of {w.numel()} values are not finite, the first at {places[0].tolist()}"
        raise ModelError(name, what, "Look for a diverged run or a damaged checkpoint; start from an earlier one")


class _FakeQuantize(torch.autograd.Function):
    """decode(encode(w)) of one part, and the quantiser's own gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        w_RGS: Tensor,
        alpha_RG1: Tensor | None,
        strength: Tensor | None,
        quantizer: Quantizer,
        spec: QuantSpec,
        gain: float,
    ) -> Tensor:
        w = w_RGS.to(_compute_dtype(w_RGS))
        scale_RGC, zero_RG1 = _scale_and_zero(quantizer, w, alpha_RG1, spec)
        index_RGS = quantizer.encode(w, scale_RGC, zero_RG1, spec.rounding)
        if not quantizer.identity_gradient:
            ctx.save_for_backward(w_RGS, scale_RGC, zero_RG1, strength)
        ctx.quantizer, ctx.rounding, ctx.gain = quantizer, spec.rounding, gain
        ctx.alpha_dtype = None if alpha_RG1 is None else alpha_RG1.dtype
        return softened(w, quantizer.decode(index_RGS, scale_RGC), strength).to(w_RGS.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None, None, None]:
        (grad_RGS,) = grads
        if ctx.quantizer.identity_gradient:  # of Q(w), so of every mixture with w
            return grad_RGS, None, None, None, None, None
        w_RGS, scale_RGC, zero_RG1, strength = ctx.saved_tensors
        grad = grad_RGS.to(scale_RGC.dtype)
        grad_w_RGS, grad_alpha_RG1 = ctx.quantizer.gradient(
            grad, w_RGS.to(scale_RGC.dtype), scale_RGC, zero_RG1, ctx.rounding
        )
        grad_w_RGS = softened(grad, grad_w_RGS, strength)
        if grad_alpha_RG1 is not None:
            grad_alpha_RG1 = (grad_alpha_RG1 * ctx.gain * (1.0 if strength is None else strength)).to(ctx.alpha_dtype)
        return grad_w_RGS.to(w_RGS.dtype), grad_alpha_RG1, None, None, None, None


def _prepare(
    w_NK: Tensor, spec: QuantSpec, alpha: Tensor | None, name: str
) -> tuple[Grouping, Quantizer, tuple[Tensor | None, ...]]:
    """The grouping, the quantiser and one alpha (or None) per part."""
    if w_NK.dim() != 2 or not w_NK.numel() or not w_NK.is_floating_point():
        raise ModelError(name, f"{w_NK.dtype} {list(w_NK.shape)} is no matrix of floats", "Quantise [N, K] matrices")
    grouping = Grouping.of(spec, (w_NK.shape[0], w_NK.shape[1]))
    if (alpha is not None) != spec.format.learns_scale:
        what = f"{spec.format} {'needs' if alpha is None else 'has no'} alpha"
        raise ModelError(name, what, "Give alpha=initial_alpha(w, spec) for seq and lsq formats, and only for them")
    if alpha is None:
        return grouping, quantizer_of(spec.format), (None,) * (2 if grouping.tail else 1)
    if alpha.numel() != grouping.rows * grouping.groups:
        what = f"alpha of shape {list(alpha.shape)} for {grouping.rows} x {grouping.groups} groups"
        raise ModelError(name, what, "Give alpha=initial_alpha(w, spec), for the same spec")
    return grouping, quantizer_of(spec.format), grouping.split_groups(alpha)


def _scale_and_zero(
    quantizer: Quantizer, w_RGS: Tensor, alpha_RG1: Tensor | None, spec: QuantSpec
) -> tuple[Tensor, Tensor | None]:
    """The scale as it will be stored, and the zero points that follow from it."""
    if alpha_RG1 is None:
        return quantizer.scale_and_zero(w_RGS, spec.scale_dtype)
    return quantizer.learned_scale_and_zero(alpha_RG1.to(w_RGS.dtype), spec.scale_dtype)


def _stored(per_group_RGC: Tensor, spec: QuantSpec) -> Tensor:
    """[R, G, C] in the shape in which it is stored."""
    if spec.granularity in (Granularity.TENSOR, Granularity.BLOCK):
        return per_group_RGC.reshape(-1)
    return per_group_RGC if per_group_RGC.shape[-1] > 1 else per_group_RGC.squeeze(-1)


def _compute_dtype(w: Tensor) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.promote_types(w.dtype, torch.float32)
