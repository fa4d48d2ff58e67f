"""How good a student is on a text, in sums over tokens: what perplexity, KL and agreement are made of.

One implementation for `evaluate` and for the curves of a training run.    T tokens   D hidden size   V vocabulary
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bitdistill_ray.losses.divergence import kl_divergence
from bitdistill_ray.losses.teacher_view import Head

CHUNK = 1024  # tokens whose logits exist at a time


@torch.no_grad()
def quality_sums(
    student_head: Head,
    student_TD: Tensor,
    labels_T: Tensor,
    teacher_head: Head | None = None,
    teacher_TD: Tensor | None = None,
) -> Tensor:
    """float64 [3] on the student's device, summed over the tokens of a window: negative log-likelihood in nats,
    KL(teacher || student) in nats, and 1 where both find the same token likeliest; the last two 0 without a teacher.

    student_TD, teacher_TD   what the heads consume, each on its own model's device; logits are compared in fp32
    labels_T                 the token that follows each
    """
    sums = torch.zeros(3, dtype=torch.float64, device=student_TD.device)
    for first in range(0, len(labels_T), CHUNK):
        piece = slice(first, first + CHUNK)
        log_s_TV = student_head(student_TD[piece]).float().log_softmax(-1)
        labels = labels_T[piece].to(log_s_TV.device)
        found = [F.nll_loss(log_s_TV, labels, reduction="sum"), sums.new_zeros(()), sums.new_zeros(())]
        if teacher_TD is not None and teacher_head is not None:
            log_t_TV = teacher_head(teacher_TD[piece]).float().log_softmax(-1).to(log_s_TV.device)
            found[1:] = [kl_divergence(log_t_TV, log_s_TV).sum(), (log_t_TV.argmax(-1) == log_s_TV.argmax(-1)).sum()]
        sums += torch.stack([value.double() for value in found])
    return sums
