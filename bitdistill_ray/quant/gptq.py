"""GPTQ (arXiv 2210.17323): each column is rounded in turn, and the others make up for what that cost the output.

With H = mean_t x_t x_t^T over calibration tokens and U the upper Cholesky factor of its inverse, for columns j in turn:

    e_j = (w_j - Q(w_j)) / U_jj          w_k -= e_j U_jk        for all k > j

The scales are known before ("static groups"), so any format and any granularity goes, columns may be taken by falling
activation (`by_activation`, GPTQ's act-order), and they may be those of clipped weights (`like_NK`): the ranges that
the clipping search found are then filled by codes that see each other.

What comes back are *latent* weights: each column as it stood when it was rounded, not its code's value, held so that
`quantize` derives the same scales and codes from them.  Training starts from there, export packs it, and the rounding
error that GPTQ left is still there to be learned away.

    U, H [K, K]    e one column of errors [N]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitdistill_ray.core import QuantSpec
from bitdistill_ray.errors import ModelError
from bitdistill_ray.quant.base import check_finite, fake_quantize, scales_of
from bitdistill_ray.quant.grouping import Grouping
from bitdistill_ray.quant.moments import output_errors
from bitdistill_ray.quant.quantizer import Quantizer, quantizer_of

COLUMNS_AT_ONCE = 128  # whose updates of the columns behind them are gathered into one product


@dataclass(slots=True, kw_only=True, eq=False)
class Solved:
    """Latent weights in the dtype of the given ones; mean squared output errors of rounding and of their codes."""

    w_NK: Tensor
    error_before: float
    error_after: float


@torch.no_grad()
def solve_gptq(
    w_NK: Tensor,
    gram_KK: Tensor,
    spec: QuantSpec,
    *,
    alpha: Tensor | None = None,
    like_NK: Tensor | None = None,
    damping: float = 0.01,
    by_activation: bool = True,
    name: str = "weight",
) -> Solved:
    """GPTQ's weights for a layer whose inputs have second moments `gram_KK` (means over tokens, any float dtype).

    alpha    as in `quantize`, for formats that learn it; it stays as it is
    like_NK  weights whose scales are taken, such as the clipped ones; None: `w_NK` itself
    damping  added to H's diagonal, as a share of its mean: what is not known from the calibration tokens
    Raises ModelError, naming `name`, for weights or moments that are not finite or do not fit each other.
    """
    check_finite(w_NK, name)
    check_finite(gram_KK, f"{name}: squared activations")
    K = w_NK.shape[1]
    if gram_KK.shape != (K, K):
        raise ModelError(name, f"second moments {list(gram_KK.shape)} for {K} inputs", "Give those of this layer")
    w = w_NK.to(torch.promote_types(w_NK.dtype, torch.float32))
    gram = gram_KK.to(w)
    like_NK = w_NK if like_NK is None else like_NK
    scale, zero = scales_of(like_NK, spec, alpha=alpha)
    order_K = (
        gram.diagonal().argsort(descending=True, stable=True) if by_activation else torch.arange(K, device=w.device)
    )
    factor_KK = _inverse_factor(gram[order_K][:, order_K], damping)
    solved = _round_in_turn(
        w[:, order_K], factor_KK, scale[:, order_K], None if zero is None else zero[:, order_K], spec
    )
    latent_NK = torch.empty_like(w)
    latent_NK[:, order_K] = solved
    latent_NK = _held(latent_NK, like_NK, spec, alpha).to(w_NK.dtype)
    before, after = (output_error(w_NK, candidate, gram, spec, alpha) for candidate in (like_NK, latent_NK))
    return Solved(w_NK=latent_NK, error_before=before, error_after=after)


def output_error(w_NK: Tensor, candidate_NK: Tensor, gram_KK: Tensor, spec: QuantSpec, alpha: Tensor | None) -> float:
    """Mean over tokens of |x (w - Q(candidate))|^2, summed over the outputs."""
    d_NK = w_NK.to(gram_KK) - fake_quantize(candidate_NK, spec, alpha=alpha).to(gram_KK)
    return float(output_errors(d_NK, gram_KK).sum())


def _inverse_factor(gram_KK: Tensor, damping: float) -> Tensor:
    """U with U^T U = H^-1, upper triangular; inputs that are never there get a diagonal of their own."""
    diagonal_K = gram_KK.diagonal()
    mean = diagonal_K.mean().clamp_min(torch.finfo(gram_KK.dtype).tiny)
    silent_K = torch.where(diagonal_K > 0, 0.0, mean)
    h = gram_KK.double() + torch.diag(silent_K + damping * mean).double()
    factor_KK: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    return factor_KK.to(gram_KK)


def _round_in_turn(
    w_NK: Tensor, factor_KK: Tensor, scale_NKC: Tensor, zero_NK1: Tensor | None, spec: QuantSpec
) -> Tensor:
    """Each column as it stood when its turn came."""
    quantizer, K = quantizer_of(spec.format), w_NK.shape[1]
    w_NK = w_NK.clone()
    for begin in range(0, K, COLUMNS_AT_ONCE):
        end = min(begin + COLUMNS_AT_ONCE, K)
        errors_NB = torch.empty_like(w_NK[:, begin:end])
        for j in range(begin, end):
            column_N11 = w_NK[:, j, None, None]
            own = (scale_NKC[:, j, None], None if zero_NK1 is None else zero_NK1[:, j, None])
            index_N11 = quantizer.encode(column_N11.clone(), *own, spec.rounding)
            error_N1 = (column_N11 - quantizer.decode(index_N11, own[0]))[:, 0] / factor_KK[j, j]
            w_NK[:, j + 1 : end] -= error_N1 * factor_KK[j, j + 1 : end]
            errors_NB[:, j - begin] = error_N1[:, 0]
        w_NK[:, end:] -= errors_NB @ factor_KK[begin:end, end:]
    return w_NK


def _held(latent_NK: Tensor, like_NK: Tensor, spec: QuantSpec, alpha: Tensor | None) -> Tensor:
    """The latent weights with the scales of `like_NK`, for formats whose scale is a statistic of the weights."""
    if alpha is not None:
        return latent_NK
    quantizer: Quantizer = quantizer_of(spec.format)
    grouping = Grouping.of(spec, (like_NK.shape[0], like_NK.shape[1]))
    parts = zip(grouping.split(latent_NK), grouping.split(like_NK.to(latent_NK)), strict=True)
    held = [quantizer.hold(latent_RGS, like_RGS, spec) for latent_RGS, like_RGS in parts]
    return grouping.join(held, (like_NK.shape[0], like_NK.shape[1]))
