"""TeacherSignals as log-probabilities, for a slice of tokens at a time, whatever the wire form.

HIDDEN   the teacher's last hidden states: a frozen copy of its LM head makes the logits of this slice only, so that
         the KL is exact over the whole vocabulary and no [tokens, V] is ever held.
LOGITS   the numerical reference.
TOPK     the S likeliest tokens, and *one more class* for all the others: its probability is known exactly on both
         sides (1 - sum of the S).  By the log-sum inequality the divergence between these S + 1 classes is a lower
         bound of the divergence over V, tight as the tail's mass goes to 0.  Dropping the tail or renormalising the S
         instead (as peers do) would leave the student free to put its mass anywhere else.  The tail at another
         temperature cannot be known from probabilities at 1, so temperatures other than 1 are refused.
SAMPLED  S tokens drawn from the teacher: the mean of log T - log S over them is an unbiased forward KL, with an
         unbiased gradient.  Any other divergence needs probabilities of tokens that were not drawn.

A view shows its rows only through `compare` (both sides over the same classes) and the two confidences that CAKLD's
gamma is made of.  Views are built inside the checkpointed chunk and die with it.

Shapes: those of divergence.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from bitdistill_ray.core import Payload, TeacherSignals
from bitdistill_ray.errors import ConfigError, TeacherError
from bitdistill_ray.losses.divergence import LOG_FLOOR, teacher_log_probabilities

Head = Callable[[Tensor], Tensor]
"""An LM head: hidden [n, D] to logits [n, V]."""


class TeacherView(Protocol):
    """What a teacher said about some tokens."""

    def compare(self, student_log_nV: Tensor, *, temperature: float) -> tuple[Tensor, Tensor]:
        """(student, teacher) log-probabilities [n, P] over the same classes; `student_log_nV` is at `temperature`."""
        ...

    def label_probability(self, labels_n: Tensor) -> Tensor:
        """fp32 [n]: the teacher's probability of the data token at temperature 1 (0 where there is no label)."""
        ...

    def largest_probability(self) -> Tensor:
        """fp32 [n]: the probability of the teacher's likeliest token at temperature 1."""
        ...


ViewMaker = Callable[[Tensor], TeacherView]
"""From used_n (bool: rows that some term looks at) to the view of a chunk."""


@dataclass(frozen=True, slots=True)
class DenseView:
    """Logits over the whole vocabulary."""

    logits_nV: Tensor

    def compare(self, student_log_nV: Tensor, *, temperature: float) -> tuple[Tensor, Tensor]:
        """See TeacherView: the classes are the vocabulary."""
        return student_log_nV, teacher_log_probabilities(self.logits_beside(student_log_nV), temperature=temperature)

    def logits_beside(self, student_nV: Tensor) -> Tensor:
        """The logits, which are of the student's vocabulary."""
        if self.logits_nV.shape[-1] != student_nV.shape[-1]:
            raise TeacherError("teacher vocabulary",
                               f"{self.logits_nV.shape[-1]} logits, the student has {student_nV.shape[-1]}",
                               "Use a teacher and a student that share tokenizer and vocabulary size")  # fmt: skip
        return self.logits_nV

    def label_probability(self, labels_n: Tensor) -> Tensor:
        """See TeacherView."""
        picked_n1 = self.logits_nV.gather(-1, labels_n.clamp_min(0).unsqueeze(-1)).float()
        probability_n = (picked_n1.squeeze(-1) - self.logits_nV.float().logsumexp(-1)).exp()
        return torch.where(labels_n >= 0, probability_n, 0.0)

    def largest_probability(self) -> Tensor:
        """See TeacherView."""
        return (self.logits_nV.amax(-1).float() - self.logits_nV.float().logsumexp(-1)).exp()


@dataclass(frozen=True, slots=True)
class TopKView:
    """The S likeliest tokens, and everything else as one class: P = S + 1, the tail last."""

    ids_nS: Tensor
    logprobs_nS: Tensor

    def compare(self, student_log_nV: Tensor, *, temperature: float) -> tuple[Tensor, Tensor]:
        """See TeacherView: a lower bound of the divergence over the vocabulary.

        The student's tail is a log-sum-exp over its other tokens and not log(1 - sum), which loses all digits and
        makes infinite gradients once the student agrees with the teacher.  With S = V there is no tail.
        """
        if temperature != 1.0:
            raise ConfigError("objective.temperature", f"{temperature} with the topk payload, whose tail is known at 1",
                              "Use temperature 1, or teacher.payload=hidden")  # fmt: skip
        ids_nS = self.ids_nS.long()
        if ids_nS.shape[-1] == student_log_nV.shape[-1]:
            return student_log_nV.gather(-1, ids_nS), teacher_log_probabilities(self.logprobs_nS)
        tail_n1 = student_log_nV.scatter(-1, ids_nS, LOG_FLOOR).logsumexp(-1, keepdim=True)
        student_log_nP = torch.cat((student_log_nV.gather(-1, ids_nS), tail_n1), dim=-1)
        return student_log_nP, self._teacher_log_probs().to(student_log_nP.dtype)

    @torch.no_grad()
    def _teacher_log_probs(self) -> Tensor:
        """[n, S + 1], summing to 1 although the wire may have rounded (fp16) the sum of the S past it."""
        logprobs_nS = self.logprobs_nS.float()
        tail_n1 = (1.0 - logprobs_nS.exp().sum(-1, keepdim=True)).clamp_min(0.0).log().clamp_min(LOG_FLOOR)
        return torch.log_softmax(torch.cat((logprobs_nS, tail_n1), dim=-1), dim=-1).clamp_min_(LOG_FLOOR)

    def label_probability(self, labels_n: Tensor) -> Tensor:
        """See TeacherView; a label outside the S counts as 0 (it is at most the S-th probability)."""
        hit_nS = (self.ids_nS == labels_n.unsqueeze(-1)) & (labels_n >= 0).unsqueeze(-1)
        return torch.where(hit_nS, self.logprobs_nS.float().exp(), 0.0).sum(-1)

    def largest_probability(self) -> Tensor:
        """See TeacherView."""
        return self.logprobs_nS.float().amax(-1).exp()


@dataclass(frozen=True, slots=True)
class SampledView:
    """S tokens drawn from the teacher's distribution at temperature 1."""

    ids_nS: Tensor
    logprobs_nS: Tensor

    def forward_kl(self, student_log_nV: Tensor, *, temperature: float) -> Tensor:
        """fp32 [n]: an unbiased estimate of KL(teacher || student); may be below 0 for a token."""
        if temperature != 1.0:
            raise ConfigError("objective.temperature", f"{temperature} with the sampled payload, drawn at 1",
                              "Use temperature 1, or teacher.payload=hidden")  # fmt: skip
        student_nS = student_log_nV.gather(-1, self.ids_nS.long())
        return (self.logprobs_nS.to(student_nS.dtype) - student_nS).mean(-1)

    def compare(self, student_log_nV: Tensor, *, temperature: float) -> tuple[Tensor, Tensor]:
        """Refused: draws are no distribution over classes."""
        raise self._refusal("a divergence other than forward_kl")

    def label_probability(self, labels_n: Tensor) -> Tensor:
        """Refused: the label may not be among the draws."""
        raise self._refusal("the teacher's confidence")

    def largest_probability(self) -> Tensor:
        """Refused: the likeliest token may not be among the draws."""
        raise self._refusal("the teacher's confidence")

    @staticmethod
    def _refusal(what: str) -> ConfigError:
        return ConfigError("teacher.payload", f"sampled cannot tell {what}",
                           "Use the forward_kl loss, or teacher.payload=hidden")  # fmt: skip


def payload_of(signals: TeacherSignals) -> Payload:
    """Which of the wire forms `signals` carries; refuses none and more than one."""
    forms = {
        Payload.HIDDEN: signals.hidden_BTD,
        Payload.LOGITS: signals.logits_BTV,
        Payload.TOPK: signals.topk,
        Payload.SAMPLED: signals.sampled,
    }
    given = [payload for payload, tensor in forms.items() if tensor is not None]
    if len(given) != 1:
        raise TeacherError("teacher signals", f"{[str(p) for p in given] or 'none'} of hidden, logits, topk, sampled",
                           "Give exactly one of them")  # fmt: skip
    return given[0]


def _flat_chunks(tensor_BTx: Tensor, tokens: int, chunk_tokens: int) -> tuple[Tensor, ...]:
    if tensor_BTx.shape[:2].numel() != tokens:
        raise TeacherError("teacher signals", f"{list(tensor_BTx.shape[:2])} positions, the student has {tokens}",
                           "Ask the teacher about the same batch")  # fmt: skip
    return torch.split(tensor_BTx.detach().flatten(0, 1), chunk_tokens)


def blank(tensor_nx: Tensor, used_n: Tensor) -> Tensor:
    """Zero the rows that no term looks at: a NaN made on padding must not reach a gradient as 0 * NaN."""
    return torch.where(used_n.unsqueeze(-1), tensor_nx, 0.0)


def _from_hidden(head: Head, hidden_nD: Tensor, used_n: Tensor) -> DenseView:
    with torch.no_grad():
        return DenseView(head(blank(hidden_nD, used_n)))


def _from_logits(logits_nV: Tensor, used_n: Tensor) -> DenseView:
    return DenseView(blank(logits_nV, used_n))


def _from_topk(ids_nS: Tensor, logprobs_nS: Tensor, used_n: Tensor) -> TopKView:
    return TopKView(ids_nS, blank(logprobs_nS, used_n))


def _from_draws(ids_nS: Tensor, logprobs_nS: Tensor, used_n: Tensor) -> SampledView:
    return SampledView(ids_nS, blank(logprobs_nS, used_n))


def teacher_views(
    signals: TeacherSignals, teacher_head: Head | None, *, tokens: int, chunk_tokens: int
) -> list[ViewMaker]:
    """One maker per `chunk_tokens` tokens of the flattened batch.

    `teacher_head` is needed for HIDDEN; it runs under no_grad, each time a view is made.
    """
    payload_of(signals)
    if signals.topk is not None:
        ids = _flat_chunks(signals.topk.ids_BTS, tokens, chunk_tokens)
        logprobs = _flat_chunks(signals.topk.logprobs_BTS, tokens, chunk_tokens)
        return [partial(_from_topk, i, p) for i, p in zip(ids, logprobs, strict=True)]
    if signals.sampled is not None:
        ids = _flat_chunks(signals.sampled.ids_BTS, tokens, chunk_tokens)
        logprobs = _flat_chunks(signals.sampled.logprobs_BTS, tokens, chunk_tokens)
        return [partial(_from_draws, i, p) for i, p in zip(ids, logprobs, strict=True)]
    if signals.logits_BTV is not None:
        return [partial(_from_logits, z) for z in _flat_chunks(signals.logits_BTV, tokens, chunk_tokens)]
    assert signals.hidden_BTD is not None  # payload_of saw to it
    if teacher_head is None:
        raise TeacherError("teacher head", "none, and the teacher sent hidden states",
                           "Load the teacher's LM head beside the student, or use teacher.payload=topk")  # fmt: skip
    return [partial(_from_hidden, teacher_head, h) for h in _flat_chunks(signals.hidden_BTD, tokens, chunk_tokens)]
