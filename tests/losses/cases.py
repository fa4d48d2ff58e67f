"""Small random batches, and the losses written out from their definitions in float64, without the library's code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bitdistill_ray.core import AttentionStates, TeacherSignals, TokenBatch, TopK
from bitdistill_ray.losses.objective import GammaMode, Objective, Reduction, Scope, Term, TermKind

B, T, D, V = 2, 11, 8, 29

GAMMA = 0.35
CE = Term(kind=TermKind.CE)
OBJECTIVES = {
    "ce": Objective(terms=(CE,)),
    "bitdistiller": Objective(terms=(Term(kind=TermKind.CAKLD, gamma_mode=GammaMode.LABEL),)),
    "bitdistiller-code": Objective(
        terms=(Term(kind=TermKind.CAKLD, gamma_mode=GammaMode.MAX),), reduction=Reduction.SEQUENCE_SUM
    ),
    "angelslim": Objective(terms=(CE, Term(kind=TermKind.CAKLD, gamma_mode=GammaMode.PER_TOKEN))),
    "bitdistill": Objective(
        terms=(CE, Term(kind=TermKind.FORWARD_KL, weight=10, temperature=5, tau_squared=True, scope=Scope.PRESENT))
    ),
    "jsd+reverse": Objective(
        terms=(Term(kind=TermKind.JSD, beta=0.2), Term(kind=TermKind.REVERSE_KL, weight=0.5, scope=Scope.PRESENT))
    ),
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def logits(n: int = 6, v: int = V, *, seed: int = 0, scale: float = 2.0, dtype: torch.dtype = torch.float64) -> Tensor:
    return (torch.randn(n, v, generator=generator(seed), dtype=torch.float64) * scale).to(dtype)


def token_batch(seed: int = 0) -> TokenBatch:
    """Row 0: two documents with a prompt each; row 1: one document and four tokens of padding."""
    ids_BT = torch.randint(0, V, (B, T), generator=generator(seed))
    target_BT = torch.ones(B, T, dtype=torch.bool)
    target_BT[0, :2] = target_BT[0, 5:7] = target_BT[1, :1] = False
    target_BT[1, 7:] = False
    segment_BT = torch.tensor([[0] * 5 + [1] * 6, [0] * 7 + [-1] * 4], dtype=torch.int32)
    return TokenBatch(ids_BT=ids_BT, target_BT=target_BT, segment_BT=segment_BT, sequence_ids=("a#0#0", "a#0#1"))


def heads(seed: int = 3) -> tuple[nn.Linear, nn.Linear]:
    """A student's head and a frozen teacher's, D to V, fp32."""
    torch.manual_seed(seed)
    student, teacher = nn.Linear(D, V, bias=False), nn.Linear(D, V, bias=False)
    return student, teacher.requires_grad_(False)


def hidden(seed: int, b: int = B, t: int = T) -> Tensor:
    return torch.randn(b, t, D, generator=generator(seed)) * 2


def signals_of(payload: str, teacher_hidden_BTD: Tensor, teacher_head: nn.Linear, k: int = 5) -> TeacherSignals:
    """The same teacher on each wire form."""
    ids = tuple(f"a#0#{i}" for i in range(len(teacher_hidden_BTD)))
    if payload == "hidden":
        return TeacherSignals(sequence_ids=ids, hidden_BTD=teacher_hidden_BTD)
    logits_BTV = teacher_head(teacher_hidden_BTD)
    if payload == "logits":
        return TeacherSignals(sequence_ids=ids, logits_BTV=logits_BTV)
    top = logits_BTV.log_softmax(-1).topk(k)
    return TeacherSignals(sequence_ids=ids, topk=TopK(ids_BTS=top.indices.int(), logprobs_BTS=top.values))


def attention(seed: int, *, b: int = B, t: int = T, h: int = 4, j: int = 2, c: int = 4) -> AttentionStates:
    def draw(a: int, offset: int) -> Tensor:
        return torch.randn(b, a, t, c, generator=generator(seed + offset))

    return AttentionStates(layer=1, q_BHTC=draw(h, 0), k_BJTC=draw(j, 1), v_BJTC=draw(j, 2))


@dataclass(frozen=True)
class Reference:
    """Losses per token by their definitions: probabilities, not log space; float64."""

    student_nV: Tensor
    teacher_nV: Tensor
    labels_n: Tensor

    def probabilities(self, tau: float = 1.0) -> tuple[Tensor, Tensor]:
        return (self.student_nV.double() / tau).softmax(-1), (self.teacher_nV.double() / tau).softmax(-1)

    def ce(self) -> Tensor:
        student_nV, _ = self.probabilities()
        return -student_nV[torch.arange(len(self.labels_n)), self.labels_n.clamp_min(0)].log()

    def forward_kl(self, tau: float = 1.0) -> Tensor:
        s, t = self.probabilities(tau)
        return (t * (t / s).log()).sum(-1)

    def reverse_kl(self, tau: float = 1.0) -> Tensor:
        s, t = self.probabilities(tau)
        return (s * (s / t).log()).sum(-1)

    def jsd(self, beta: float) -> Tensor:
        s, t = self.probabilities()
        m = beta * t + (1 - beta) * s
        return beta * (t * (t / m).log()).sum(-1) + (1 - beta) * (s * (s / m).log()).sum(-1)

    def label_probability(self) -> Tensor:
        _, t = self.probabilities()
        return t[torch.arange(len(self.labels_n)), self.labels_n.clamp_min(0)]

    def cakld(self, gamma: float | Tensor) -> Tensor:
        return gamma * self.reverse_kl() + (1 - gamma) * self.forward_kl()

    def coarse(self, k: int) -> tuple[Tensor, Tensor]:
        """Probabilities over the teacher's k likeliest tokens and the rest."""
        s, t = self.probabilities()
        ids_nS = self.teacher_nV.topk(k).indices
        return tuple(  # type: ignore[return-value]
            torch.cat((p.gather(-1, ids_nS), 1 - p.gather(-1, ids_nS).sum(-1, keepdim=True)), -1) for p in (s, t)
        )


class Allocations(TorchDispatchMode):
    """Records the elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out
