"""CAKLD's scalar gamma, measured once before the run.

    LABEL (the paper)          mean over valid tokens of P_T(data token)
    MAX   (the authors' code)  mean over valid tokens of max_v P_T(v), always the larger

The mean is over *tokens*, pooled over all batches and ranks; padding, prompts and positions without a label are not
looked at.  The authors' code averages over padding too, and divides 11 batches by 10, so that its gamma can pass 1.
No process group is needed: ranks add their `GammaEstimate`s, or one rank measures and broadcasts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from bitdistill_ray.core import TeacherSignals
from bitdistill_ray.errors import ConfigError, DataError
from bitdistill_ray.losses.objective import GammaMode
from bitdistill_ray.losses.reduction import valid_sum
from bitdistill_ray.losses.teacher_view import Head, teacher_views


@dataclass(frozen=True, slots=True, kw_only=True)
class GammaEstimate:
    """Sum of the teacher's confidences and the number of tokens; estimates of different batches or ranks add up."""

    confidence_sum: float
    tokens: int

    def __add__(self, other: GammaEstimate) -> GammaEstimate:
        return GammaEstimate(
            confidence_sum=self.confidence_sum + other.confidence_sum, tokens=self.tokens + other.tokens
        )

    @property
    def value(self) -> float:
        """gamma, in [0, 1]."""
        if self.tokens == 0:
            raise DataError("gamma", "no token with a label in the batches it is measured on",
                            "Give batches with targets")  # fmt: skip
        return min(max(self.confidence_sum / self.tokens, 0.0), 1.0)


@torch.no_grad()
def estimate_gamma(
    batches: Iterable[tuple[TeacherSignals, Tensor]],
    mode: GammaMode,
    *,
    teacher_head: Head | None = None,
    chunk_tokens: int = 1024,
) -> GammaEstimate:
    """Measure gamma over `batches` of (signals, labels_BT), at temperature 1; `.value` is the number for the run.

    labels_BT is `TokenBatch.labels_BT`: int64, shifted, -100 where there is no target.  With the topk payload a label
    outside the top-k counts as 0, so LABEL is then slightly low.
    """
    if mode not in (GammaMode.LABEL, GammaMode.MAX):
        raise ConfigError("objective.cakld.gamma_mode", f"{mode} is not measured", "Ask for label or max")
    confidence_sum, tokens = 0.0, 0
    for signals, labels_BT in batches:
        views = teacher_views(signals, teacher_head, tokens=labels_BT.numel(), chunk_tokens=chunk_tokens)
        sums = []
        for view_of, labels_n in zip(views, torch.split(labels_BT.flatten(), chunk_tokens), strict=True):
            valid_n = labels_n >= 0
            view = view_of(valid_n)
            confidence_n = view.label_probability(labels_n) if mode is GammaMode.LABEL else view.largest_probability()
            sums.append(valid_sum(confidence_n, valid_n))
        confidence_sum += float(torch.stack(sums).double().sum())
        tokens += int((labels_BT >= 0).sum())
    return GammaEstimate(confidence_sum=confidence_sum, tokens=tokens)
