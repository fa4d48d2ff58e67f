"""Divergences between two distributions over the vocabulary, one value per token.

Everything is computed from log-softmaxes in fp32 (float64 stays float64), and stays in log space:

    KL(p || q) = sum_v exp(log p) * (log p - log q)

Never through `F.kl_div(log q, p)`: that form back-propagates through log(p) of a p that has underflowed to 0, and the
gradient of every token becomes NaN while the loss still looks fine.  A teacher may also *forbid* tokens (logits of
-inf); its log-probabilities are floored at LOG_FLOOR, where exp is exactly 0, so 0 * log 0 stays 0.  Student logits
must be finite.

Two layers: functions of logits (what people call) and, for terms that share a log-softmax, functions of
log-probabilities.  Reductions are separate (`reduction.py`).

Shapes beyond those of core.py:   n tokens, batch and time flattened   P classes compared: V, or top-k plus the tail
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LOG_FLOOR = -1e4
IGNORE = -100


def log_probabilities(logits_nV: Tensor, *, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature), at least fp32, [n, V]."""
    dtype = torch.promote_types(logits_nV.dtype, torch.float32)
    if temperature != 1.0:
        logits_nV = logits_nV.to(dtype) / temperature
    return torch.log_softmax(logits_nV, dim=-1, dtype=dtype)


@torch.no_grad()
def teacher_log_probabilities(logits_nV: Tensor, *, temperature: float = 1.0) -> Tensor:
    """The same without gradient, floored at LOG_FLOOR so that forbidden tokens (-inf) count as 0 * log 0 = 0."""
    return log_probabilities(logits_nV, temperature=temperature).clamp_min_(LOG_FLOOR)


def negative_log_likelihood(log_nV: Tensor, labels_n: Tensor) -> Tensor:
    """-log p(label) per token, 0 where the label is negative (-100)."""
    picked_n = log_nV.gather(-1, labels_n.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    return torch.where(labels_n >= 0, -picked_n, 0.0)


def kl_divergence(p_log_nP: Tensor, q_log_nP: Tensor) -> Tensor:
    """KL(p || q) from log-probabilities, summed over the last dimension; gradients flow to both sides."""
    return (p_log_nP.exp() * (p_log_nP - q_log_nP)).sum(-1)


def jensen_shannon(student_log_nP: Tensor, teacher_log_nP: Tensor, *, beta: float = 0.5) -> Tensor:
    """beta * KL(T || M) + (1 - beta) * KL(S || M) with M = beta * T + (1 - beta) * S, from log-probabilities.

    `beta` lies in (0, 1).  Divided by beta it tends to KL(T || S) for beta -> 0 (Agarwal et al., GKD, 2024).
    """
    mixture_log_nP = torch.logaddexp(teacher_log_nP + math.log(beta), student_log_nP + math.log1p(-beta))
    to_teacher_n = kl_divergence(teacher_log_nP, mixture_log_nP)
    return beta * to_teacher_n + (1 - beta) * kl_divergence(student_log_nP, mixture_log_nP)


def tau_factor(temperature: float, tau_squared: bool) -> float:
    """tau**2 where asked for, else 1."""
    return temperature * temperature if tau_squared else 1.0


def cross_entropy(logits_nV: Tensor, labels_n: Tensor) -> Tensor:
    """Cross entropy per token, [n]; 0 where the label is -100.  `labels[i]` is the token that logits[i] predict."""
    return negative_log_likelihood(log_probabilities(logits_nV), labels_n)


def forward_kl(
    student_nV: Tensor, teacher_nV: Tensor, *, temperature: float = 1.0, tau_squared: bool = False
) -> Tensor:
    """KL(teacher || student) per token, [n], from logits of any float dtype; no gradient to the teacher."""
    student_log_nV = log_probabilities(student_nV, temperature=temperature)
    teacher_log_nV = teacher_log_probabilities(teacher_nV, temperature=temperature)
    return kl_divergence(teacher_log_nV, student_log_nV) * tau_factor(temperature, tau_squared)


def reverse_kl(
    student_nV: Tensor, teacher_nV: Tensor, *, temperature: float = 1.0, tau_squared: bool = False
) -> Tensor:
    """KL(student || teacher) per token, [n], from logits of any float dtype; no gradient to the teacher."""
    student_log_nV = log_probabilities(student_nV, temperature=temperature)
    teacher_log_nV = teacher_log_probabilities(teacher_nV, temperature=temperature)
    return kl_divergence(student_log_nV, teacher_log_nV) * tau_factor(temperature, tau_squared)


def jsd(
    student_nV: Tensor, teacher_nV: Tensor, *, beta: float = 0.5, temperature: float = 1.0, tau_squared: bool = False
) -> Tensor:
    """Generalised Jensen-Shannon divergence per token, [n], from logits; see `jensen_shannon`."""
    student_log_nV = log_probabilities(student_nV, temperature=temperature)
    teacher_log_nV = teacher_log_probabilities(teacher_nV, temperature=temperature)
    return jensen_shannon(student_log_nV, teacher_log_nV, beta=beta) * tau_factor(temperature, tau_squared)
