"""Top-k answers from logits, and what a student is told by them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bitdistill_ray.losses.divergence import kl_divergence, log_probabilities
from bitdistill_ray.losses.teacher_view import TopKView

QWEN3_VOCABULARY = 151_936


def topk_of(logits_nV: Tensor, entries: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids int32, fp32 log-probabilities) [n, S], likeliest first."""
    top = log_probabilities(logits_nV).topk(entries, dim=-1)
    return top.indices.int().numpy(), top.values.numpy()


@dataclass(frozen=True, slots=True)
class Losses:
    """Means over the tokens."""

    forward: float
    reverse: float
    gradient: Tensor  # of the forward KL, by the student's logits


def losses(student_nV: Tensor, ids_nS: np.ndarray, logprobs_nS: np.ndarray) -> Losses:
    """What a student is told by these answers."""
    student_nV = student_nV.clone().requires_grad_()
    view = TopKView(torch.from_numpy(ids_nS), torch.from_numpy(logprobs_nS))
    student_nP, teacher_nP = view.compare(log_probabilities(student_nV), temperature=1.0)
    forward = kl_divergence(teacher_nP, student_nP).mean()
    (gradient,) = torch.autograd.grad(forward, student_nV, retain_graph=True)
    reverse = kl_divergence(student_nP, teacher_nP).mean()
    return Losses(float(forward.detach()), float(reverse.detach()), gradient)
