"""The whole objective with the logits of `chunk_tokens` tokens alive at a time.

The memory of distillation is the LM head, not the model: at 16k tokens and a vocabulary of 50k the fp32 logits of both
sides with their softmaxes take 18 GiB, chunked by 2048 tokens 1.3.  Each chunk goes through the student's head, the
teacher's frozen head and all terms, and makes its gradient at once (`eager_gradient.py`).  Where ZeRO-3 has sharded the
head, chunks are checkpointed instead (non-reentrant): the hidden states are kept, the rest is computed again in the
backward pass, inside the hooks that gather the head.

- The head is *called as a module* per chunk, never read by its weight: under ZeRO-3 the hooks of the module gather it.
- Shapes are static: positions without a label stay in their chunk and count 0, so that all ranks make the same number
  of head calls whatever their padding (a rank that skipped one would hang the others), and a compiled chunk is reused.
- Rows that no term looks at are zeroed before the heads: what a model makes of padding may be NaN, and 0 * NaN would
  spoil the head's gradient.
- Sums are divided by `Totals`, so that the mean over micro-batches and ranks is exact (`reduction.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bitdistill_ray.core import AttentionStates, LayerStates, TeacherSignals
from bitdistill_ray.errors import ConfigError, ModelError, TeacherError
from bitdistill_ray.losses import fused
from bitdistill_ray.losses.eager_gradient import Summed, weighted_sums
from bitdistill_ray.losses.objective import Loss, Objective
from bitdistill_ray.losses.reduction import Totals, divide, valid_sum
from bitdistill_ray.losses.relation import attention_relation_loss
from bitdistill_ray.losses.states import layer_states_loss
from bitdistill_ray.losses.teacher_view import Head, ViewMaker, blank, teacher_views
from bitdistill_ray.losses.terms import Comparison, term_values

RELATION, STATES = "relation", "states"  # their keys in Loss.parts


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """All that a chunk's sums depend on besides its hidden states; shapes as in `chunked_loss`, n tokens."""

    student_head: Head
    view_of: ViewMaker | None
    labels_n: Tensor
    present_n: Tensor
    objective: Objective
    gamma: float | Tensor | None

    def sums(self, hidden_nD: Tensor) -> Tensor:
        """Sums over the chunk's tokens of each term, fp32 [terms]; pure, without a read-back to Python."""
        return self._compare(self._tokens(hidden_nD))

    def gradient(self, hidden_nD: Tensor, factors_S: Tensor) -> Summed:
        """`sums`, and where the gradient of `factors_S` times them starts; a GPU makes both in one kernel."""
        tokens = self._tokens(hidden_nD)
        if fused.covers(tokens, self.objective):
            sums_S, grad_nV = fused.sums_and_gradient(tokens, self.present_n, self.objective, factors_S)
            return Summed(sums_S, tokens.student_nV, grad_nV)
        sums_S = self._compare(tokens)
        return Summed(sums_S.detach(), (sums_S * factors_S).sum())

    def _tokens(self, hidden_nD: Tensor) -> Comparison:
        """Both heads, on rows of zeros where no term looks."""
        target_n = self.labels_n >= 0
        used_n = self.present_n | target_n if self.objective.needs_padding else target_n
        student_nV = self.student_head(blank(hidden_nD, used_n))
        view = None if self.view_of is None else self.view_of(used_n)
        return Comparison(student_nV, view, self.labels_n, self.gamma)

    def _compare(self, tokens: Comparison) -> Tensor:
        compared = _compiled_comparison() if tokens.student_nV.is_cuda else compared_sums
        return compared(tokens, self.present_n, self.objective)


def compared_sums(tokens: Comparison, present_n: Tensor, objective: Objective) -> Tensor:
    """`Chunk.sums` after the heads: logits in, sums out; compiled, a GPU reads the logits only a few times."""
    values = term_values(tokens, objective.terms)
    scopes = [tokens.counted(term, present_n) for term in objective.terms]
    return torch.stack([valid_sum(v, s) for v, s in zip(values, scopes, strict=True)])


@cache
def _compiled_comparison() -> Callable[[Comparison, Tensor, Objective], Tensor]:
    return torch.compile(compared_sums, dynamic=False)


def chunked_loss(
    hidden_BTD: Tensor,
    student_head: Head,
    signals: TeacherSignals | None,
    teacher_head: Head | None,
    labels_BT: Tensor,
    objective: Objective,
    *,
    chunk_tokens: int,
    gamma: float | Tensor | None = None,
    segment_BT: Tensor | None = None,
    student_attention: AttentionStates | None = None,
    student_states: LayerStates | None = None,
    totals: Totals | None = None,
    relation_weight: Tensor | None = None,
) -> Loss:
    """The objective's value on one micro-batch, and its parts.

    hidden_BTD         the student's last hidden states, what its head consumes, any float dtype
    signals            what the teacher said; None where the objective needs no teacher
    teacher_head       the teacher's frozen head, for signals that carry hidden states
    labels_BT          `TokenBatch.labels_BT`: int64, already shifted, -100 where there is no target
    chunk_tokens       logits alive at a time; the last chunk may be shorter, and the number of chunks depends on
                       B * T only
    gamma              CAKLD's scalar (`Objective.scalar_gamma`)
    segment_BT         documents, -1 on padding; None: no padding, one document per sequence
    student_attention  for relations: the student's states of the layer it learns from `signals.attention`
    student_states     for layer states: the student's layers that learn from `signals.states`, in its order
    totals             what sums are divided by; None: this micro-batch's own counts
    relation_weight    scalar in place of the objective's weight of relations
    """
    if chunk_tokens < 1:
        raise ConfigError("chunk_tokens", f"{chunk_tokens}", "Give at least 1, such as 1024")
    totals = Totals.count(labels_BT, segment_BT) if totals is None else totals
    present_BT = torch.ones_like(labels_BT, dtype=torch.bool) if segment_BT is None else segment_BT >= 0
    parts: dict[str, Tensor] = {}
    value = hidden_BTD.new_zeros((), dtype=torch.float32)
    if objective.terms:
        divisors = [totals.divisor(term.scope, objective.reduction) for term in objective.terms]
        dtype = torch.promote_types(hidden_BTD.dtype, torch.float32)
        factors = [
            divide(torch.full((), term.weight, dtype=dtype, device=value.device), divisor)
            for term, divisor in zip(objective.terms, divisors, strict=True)
        ]
        value, sums = _token_sums(
            hidden_BTD, student_head, signals, teacher_head, labels_BT, present_BT, objective, chunk_tokens, gamma,
            torch.stack(factors),
        )  # fmt: skip
        for term, total, divisor in zip(objective.terms, sums.unbind(), divisors, strict=True):
            parts[term.name] = divide(total, divisor)
    if objective.relation is not None:
        if student_attention is None:
            raise ModelError("attention relations", "no attention states of the student", "Tap the student's layer")
        if signals is None or signals.attention is None:
            raise TeacherError("attention relations", "no attention states in the teacher's signals",
                               "Ask the teacher for the states of one layer")  # fmt: skip
        part = attention_relation_loss(
            student_attention,
            signals.attention,
            present_BT,
            objective.relation,
            segment_BT=segment_BT,
            total_rows=totals.present,
        )
        weight = objective.relation.weight if relation_weight is None else relation_weight
        parts[RELATION], value = part.detach(), value + weight * part
    if objective.states is not None:
        if student_states is None:
            raise ModelError("layer states", "none of the student's", "Tap the student's layers")
        if signals is None or signals.states is None:
            raise TeacherError("layer states", "none in the teacher's signals", "Ask the teacher for some layers'")
        part = layer_states_loss(student_states, signals.states, present_BT, total_tokens=totals.present)
        parts[STATES], value = part.detach(), value + objective.states.weight * part
    return Loss(value=value, parts=parts, tokens=(labels_BT >= 0).sum())


def _token_sums(
    hidden_BTD: Tensor,
    student_head: Head,
    signals: TeacherSignals | None,
    teacher_head: Head | None,
    labels_BT: Tensor,
    present_BT: Tensor,
    objective: Objective,
    chunk_tokens: int,
    gamma: float | Tensor | None,
    factors_S: Tensor,
) -> tuple[Tensor, Tensor]:
    """(the weighted sum of the terms, with gradient; the sum over all tokens of each term [S], detached)."""
    hidden_nD = hidden_BTD.flatten(0, 1)
    views: Sequence[ViewMaker | None]
    if objective.needs_distribution and signals is not None:
        views = teacher_views(signals, teacher_head, tokens=labels_BT.numel(), chunk_tokens=chunk_tokens)
    else:
        views = [None] * -(-labels_BT.numel() // chunk_tokens)
    chunks = [
        Chunk(student_head=student_head, view_of=v, labels_n=labels_n, present_n=present_n, objective=objective,
              gamma=gamma)
        for v, labels_n, present_n in zip(
            views, torch.split(labels_BT.flatten(), chunk_tokens), torch.split(present_BT.flatten(), chunk_tokens),
            strict=True,
        )
    ]  # fmt: skip
    parameters = _trained_parameters(student_head)
    if parameters is None or not (torch.is_grad_enabled() and hidden_BTD.requires_grad):
        hidden = torch.split(hidden_nD, chunk_tokens)  # split: one concatenation in the backward pass
        made = [
            checkpoint(chunk.sums, h_nD, use_reentrant=False, preserve_rng_state=False)
            for chunk, h_nD in zip(chunks, hidden, strict=True)
        ]
        total_S = torch.stack(made).sum(0)
        return (total_S * factors_S).sum(), total_S.detach()
    gradients = [(len(chunk.labels_n), chunk.gradient) for chunk in chunks]
    return weighted_sums(hidden_nD, parameters, gradients, factors_S)


def _trained_parameters(student_head: Head) -> list[nn.Parameter] | None:
    """The head's parameters that learn; None where their gradient must not be made at once.

    That is where they cannot be known, where ZeRO-3 has sharded them, and in fp16, whose loss scale only comes with the
    backward pass: without it gradients of single tokens are too small for fp16.
    """
    if not isinstance(student_head, nn.Module):
        return None
    parameters = [parameter for parameter in student_head.parameters() if parameter.requires_grad]
    late = any(hasattr(parameter, "ds_id") or parameter.dtype is torch.float16 for parameter in parameters)
    return None if late else parameters
