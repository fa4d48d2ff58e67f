"""QuantLinear: a linear layer whose weight the forward pass sees quantised.

An existing `nn.Linear` becomes one by changing its class.  Its Parameter stays the very same object, so tied weights,
optimisers and DeepSpeed's ZeRO-3 bookkeeping (which may have sharded it already) notice nothing; inside `forward` the
weight is whole, and per-tensor statistics are exact.

    y = Q(W) A(N(x)) + b        N SubLN, A int8 activations, Q weights; each where asked for
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from bitdistill_ray.core import QuantSpec
from bitdistill_ray.quant import fake_quantize, fake_quantize_activation, initial_alpha

SUBLN_EPS = 1e-6  # one eps for all norms, so that exports to runtimes with a single eps lose nothing


class SubNorm(nn.Module):
    """RMSNorm with a gain: x / sqrt(mean(x^2) + eps) * gain, in fp32, returned in the dtype of x."""

    def __init__(self, features: int, *, eps: float, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(features, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        x32 = x.float()
        return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps) * self.weight.float()).to(x.dtype)


class QuantLinear(nn.Linear):
    """A linear with fake-quantised weights (`spec`), perhaps int8 activations, perhaps a SubLN in front (`norm`).

    `spec` None leaves the weights as they are (a SubLN alone).  `alpha` is the scale of learnable formats.  `baked`:
    the weight holds the quantised values already (`bake`).  `strength`, while a student is led into quantisation, is
    how much of it weights and activations see (`soften`).  Made by `quant_linear`, never constructed.
    """

    spec: QuantSpec | None
    norm: SubNorm | None
    alpha: nn.Parameter | None
    baked: bool
    strength: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:
        """[..., K] to [..., N] in the dtype of the input; differentiable in input, weight, gain and alpha."""
        if self.norm is not None:
            input = self.norm(input)
        if self.spec is None:
            return nn.functional.linear(input, self.weight, self.bias)
        if self.spec.activation_bits is not None:
            input = fake_quantize_activation(input, self.spec.activation_bits, strength=self.strength)
        return nn.functional.linear(input, self.quantized_weight(), self.bias)

    def quantized_weight(self) -> Tensor:
        """The [N, K] weight that the forward pass multiplies by: dequantised codes, in the dtype of the weight."""
        if self.spec is None or self.baked:
            return self.weight
        return fake_quantize(self.weight, self.spec, alpha=self.alpha, strength=self.strength)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        spec = self.spec
        kind = "16-bit" if spec is None else f"{spec.format}, {spec.granularity} {spec.group_size or ''}".rstrip()
        return f"{super().extra_repr()}, {kind}"


def quant_linear(linear: nn.Linear) -> QuantLinear:
    """Make a QuantLinear of a linear, in place: at first without quantisation, norm or alpha."""
    if not isinstance(linear, QuantLinear):
        linear.__class__ = QuantLinear
        assert isinstance(linear, QuantLinear)
        linear.spec, linear.baked = None, False
        linear.register_module("norm", None)
        linear.register_parameter("alpha", None)
    return linear


def set_spec(linear: nn.Linear, spec: QuantSpec) -> QuantLinear:
    """Quantise a linear as `spec` says, in place; the alpha of learnable formats starts from its weight.

    Where ZeRO-3 has sharded the weight, all ranks call this together.
    """
    changed = quant_linear(linear)
    changed.spec, changed.alpha = spec, None
    if spec.format.learns_scale:
        with whole_parameter(changed.weight), torch.no_grad():
            changed.alpha = nn.Parameter(initial_alpha(changed.weight, spec).to(changed.weight.dtype))
    return changed


def soften(model: nn.Module, strength: Tensor) -> None:
    """From now on every QuantLinear sees weights and activations as x + strength * (Q(x) - x).

    `strength` is one scalar on the model's device, read in every pass, recorded ones too: it may be changed in place.
    """
    for linear in model.modules():
        if isinstance(linear, QuantLinear):
            linear.strength = strength


@torch.no_grad()
def bake(model: nn.Module) -> None:
    """Put the quantised values in the place of every QuantLinear's latent weight, for good: it only infers from now on.

    Quantising once instead of in each forward pass is what makes a latent student decode at a dense model's speed.
    """
    for linear in model.modules():
        if isinstance(linear, QuantLinear) and not linear.baked:
            linear.weight = nn.Parameter(linear.quantized_weight(), requires_grad=False)
            linear.baked = True


@contextmanager
def plain_linears(model: nn.Module) -> Iterator[list[tuple[str, QuantLinear]]]:
    """Inside, every QuantLinear of the model is an ordinary linear with its latent weight: no norm, no quantisation."""
    changed = [(name, module) for name, module in model.named_modules() if isinstance(module, QuantLinear)]
    for _, module in changed:
        module.__class__ = nn.Linear  # type: ignore[assignment]
    try:
        yield changed
    finally:
        for _, module in changed:
            module.__class__ = QuantLinear


@contextmanager
def whole_parameter(parameter: Tensor) -> Iterator[None]:
    """Inside, a parameter that ZeRO-3 has sharded is whole, to be read on every rank."""
    if not hasattr(parameter, "ds_id"):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        yield
