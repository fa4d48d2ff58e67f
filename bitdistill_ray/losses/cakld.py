"""CAKLD: BitDistiller's confidence-aware KL divergence.

    CAKLD = gamma * KL(S || T) + (1 - gamma) * KL(T || S)

A confident teacher (gamma near 1) makes it mode seeking, an uncertain one mode covering.  gamma is the teacher's
confidence: a scalar measured before the run (`gamma.py`) or one value per token.  It carries no gradient and is held
in [0, 1]: the authors' estimate could pass 1, which turns the forward KL's weight negative.

Shapes: those of divergence.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitdistill_ray.losses.divergence import kl_divergence, log_probabilities, tau_factor, teacher_log_probabilities


def confidence_aware_kl(student_log_nP: Tensor, teacher_log_nP: Tensor, gamma: float | Tensor) -> Tensor:
    """CAKLD per token from log-probabilities; `gamma` is a scalar or [n], clamped to [0, 1]."""
    reverse_n = kl_divergence(student_log_nP, teacher_log_nP)
    forward_n = kl_divergence(teacher_log_nP, student_log_nP)
    return mixed(reverse_n, forward_n, clamped(gamma, like=student_log_nP))


def clamped(gamma: float | Tensor, *, like: Tensor) -> Tensor:
    """gamma in [0, 1], without gradient, in the dtype of `like`."""
    return torch.as_tensor(gamma, dtype=like.dtype).detach().clamp(0.0, 1.0)


def mixed(reverse_n: Tensor, forward_n: Tensor, gamma: Tensor) -> Tensor:
    """CAKLD of KL(S || T) and KL(T || S)."""
    return gamma * reverse_n + (1.0 - gamma) * forward_n


def cakld(
    student_nV: Tensor,
    teacher_nV: Tensor,
    gamma: float | Tensor,
    *,
    temperature: float = 1.0,
    tau_squared: bool = False,
) -> Tensor:
    """CAKLD per token, [n], from logits of any float dtype; no gradient to the teacher nor to gamma."""
    student_log_nV = log_probabilities(student_nV, temperature=temperature)
    teacher_log_nV = teacher_log_probabilities(teacher_nV, temperature=temperature)
    return confidence_aware_kl(student_log_nV, teacher_log_nV, gamma) * tau_factor(temperature, tau_squared)
