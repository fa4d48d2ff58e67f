"""AWQ's search (arXiv 2306.00978): how much larger to make the weights of input channels that carry much.

Weights are multiplied by s before rounding and what they multiply is divided by it, which changes nothing but the
rounding.  Over a grid of exponents,

    s = rms(x)^a / sqrt(max rms^a * min rms^a)        a in {0, 1/steps, 2/steps, ...}

that a is kept whose sum of output errors, tr(d H d^T) with d = w - Q(w s) / s, is the smallest; a = 0 is no scaling, so
the result is never worse than that.  The error is exact through second moments H of the inputs (the authors run 512
tokens through the layer), and rms(x) is the root of H's diagonal where they take mean |x|.

For ternary a is tried below 0 too, and is found there: its level is mean |w|, and a Gaussian's error is least at 1.5
times that, so a channel that carries much wants a level above the others'.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bitdistill_ray.core import QuantSpec
from bitdistill_ray.quant.base import fake_quantize, initial_alpha
from bitdistill_ray.quant.moments import output_errors
from bitdistill_ray.quant.quantizer import quantizer_of

SMALLEST = 1e-4  # of a channel's rms, against the mean of all: channels that are hardly there are not scaled to nothing


@torch.no_grad()
def search_scales(
    linears: Sequence[tuple[Tensor, QuantSpec]],
    gram_KK: Tensor,
    *,
    steps: int = 20,
    tie: Callable[[Tensor], Tensor] = lambda rms_K: rms_K,
) -> tuple[Tensor, float, float]:
    """(scales s [K] in float32, output error without and with them) for linears that read the same input.

    linears  weights [N, K] and how each is quantised
    gram_KK  second moments of their input
    tie      makes the rms of channels that must share a scale the same
    """
    rms_K = tie(gram_KK.diagonal().float().clamp_min(0).sqrt())
    rms_K = rms_K.clamp_min(SMALLEST * float(rms_K.mean()) + torch.finfo(torch.float32).tiny)
    exponents = [step / steps for step in range(steps)]
    if any(quantizer_of(spec.format).low_level for _, spec in linears):
        exponents += [-exponent for exponent in exponents[1:]]
    powers_PK = torch.stack([rms_K.pow(exponent) for exponent in exponents])
    s_PK = powers_PK / (powers_PK.amax(-1, keepdim=True) * powers_PK.amin(-1, keepdim=True)).sqrt()
    errors_P = torch.stack([torch.stack([_error(w, s_K, gram_KK, spec) for w, spec in linears]).sum() for s_K in s_PK])
    best = int(errors_P.argmin())  # the least scaling of equals; the one time that the device is waited for
    return s_PK[best], float(errors_P[0]), float(errors_P[best])


def _error(w_NK: Tensor, s_K: Tensor, gram_KK: Tensor, spec: QuantSpec) -> Tensor:
    scaled_NK = (w_NK.float() * s_K).to(w_NK.dtype)
    alpha = initial_alpha(scaled_NK, spec) if spec.format.learns_scale else None
    d_NK = w_NK.float() - fake_quantize(scaled_NK, spec, alpha=alpha).float() / s_K
    return output_errors(d_NK, gram_KK.float()).sum()
