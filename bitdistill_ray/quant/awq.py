"""AWQ's search (arXiv 2306.00978): how much larger to make the weights of input channels that carry much.

Weights are multiplied by s before rounding and what they multiply is divided by it, which changes nothing but the
rounding.  Over a grid of exponents,

    s = rms(x)^a / sqrt(max rms^a * min rms^a)        a in {0, 1/steps, 2/steps, ...}

that a is kept whose sum of output errors, tr(d H d^T) with d = w - Q(w s) / s, is the smallest; a = 0 is no scaling, so
the result is never worse than that.  The error is exact through second moments H of the inputs (the authors run 512
tokens through the layer), and rms(x) is the root of H's diagonal where they take mean |x|.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bitdistill_ray.core import QuantSpec
from bitdistill_ray.quant.base import fake_quantize, initial_alpha

SMALLEST = 1e-4  # of a channel's rms, against the mean of all: channels that are hardly there are not scaled to nothing


@torch.no_grad()
def search_scales(
    linears: Sequence[tuple[Tensor, QuantSpec | None]],
    gram_KK: Tensor,
    *,
    steps: int = 20,
    tie: Callable[[Tensor], Tensor] = lambda rms_K: rms_K,
) -> tuple[Tensor, float, float]:
    """(scales s [K] in float32, output error without and with them) for linears that read the same input.

    linears  weights [N, K] and how each is quantised (None: it is not, and has no error)
    gram_KK  second moments of their input
    tie      makes the rms of channels that must share a scale the same
    """
    rms_K = tie(gram_KK.diagonal().float().clamp_min(0).sqrt())
    rms_K = rms_K.clamp_min(SMALLEST * float(rms_K.mean()) + torch.finfo(torch.float32).tiny)
    best_K = torch.ones_like(rms_K)
    errors: list[float] = []
    for step in range(steps):
        s_K = rms_K.pow(step / steps)
        s_K = s_K / (s_K.max() * s_K.min()).sqrt()
        error = sum(_error(w_NK, s_K, gram_KK, spec) for w_NK, spec in linears)
        if errors and error < min(errors):
            best_K = s_K
        errors.append(error)
    return best_K, errors[0], min(errors)


def _error(w_NK: Tensor, s_K: Tensor, gram_KK: Tensor, spec: QuantSpec | None) -> float:
    if spec is None:
        return 0.0
    scaled_NK = (w_NK.float() * s_K).to(w_NK.dtype)
    alpha = initial_alpha(scaled_NK, spec) if spec.format.learns_scale else None
    d_NK = w_NK.float() - fake_quantize(scaled_NK, spec, alpha=alpha).float() / s_K
    return float(((d_NK @ gram_KK.float()) * d_NK).sum())
