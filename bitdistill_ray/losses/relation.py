"""Attention-relation distillation: the student's tokens relate to each other as the teacher's do.

For each A of Q, K, V of one layer, with heads merged to [T, heads*C] and split anew into R relation heads of width W:

    relation_A = softmax(f(A, A) / temperature)         f: cosine, or dot / sqrt(W)          rows of length T
    loss       = sum_A alpha_A * mean over rows and heads of KL(relation_A of teacher || of student)      [/ R]

Three definitions are in use (BitNet Distillation), and all are settings of `RelationTerm`:

    equations 10-12   form=SCALED_DOT, relation_heads=None
    Algorithm 1       form=COSINE, relation_heads=32
    authors' code     the same with divide_by_heads=True; over several layers it divides by their number as well,
                      that is, the mean of this function over the layers

What the authors' code does not do: padding is masked out of rows *and* columns, tokens relate only within their own
document, and the KL stays in log space.  One relation tensor is [B, R, T, T] (1 GB in fp32 at 32 x 32 x 512 x 512), so
relation heads go in chunks, on a GPU through one kernel (`relation_gradient.py`), elsewhere under non-reentrant
checkpointing.  Products run in the states' own dtype (tensor cores for bf16, and fp32 ones would take nearly half of
the step); softmax and KL in fp32.

Shapes beyond those of core.py:   A heads of one of Q, K, V: H or J   R relation heads   W width of a relation head
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.checkpoint import checkpoint

from bitdistill_ray.core import AttentionStates
from bitdistill_ray.errors import ConfigError, ModelError
from bitdistill_ray.losses import fused
from bitdistill_ray.losses.divergence import kl_divergence
from bitdistill_ray.losses.objective import RelationForm, RelationTerm
from bitdistill_ray.losses.reduction import divide, valid_sum
from bitdistill_ray.losses.relation_gradient import MASKED, row_kl_sum

_NORM_EPS = 1e-6


def allowed_pairs(valid_BT: Tensor, *, segment_BT: Tensor | None = None, causal: bool = False) -> Tensor:
    """bool [B, 1, T, T]: may the token of the row relate to that of the column?"""
    allowed_BTT = valid_BT.unsqueeze(2) & valid_BT.unsqueeze(1)
    if segment_BT is not None:
        allowed_BTT = allowed_BTT & (segment_BT.unsqueeze(2) == segment_BT.unsqueeze(1))
    return (allowed_BTT.tril() if causal else allowed_BTT).unsqueeze(1)


def relation_rows(states_BATC: Tensor, valid_BT: Tensor, term: RelationTerm) -> Tensor:
    """[B, R, T, W]: rows scaled so that relation logits are plain dot products, in the states' dtype; padding is 0."""
    if states_BATC.shape[2] != valid_BT.shape[1]:
        raise ModelError("attention relations", f"states of {states_BATC.shape[2]} tokens, a batch of"
                         f" {valid_BT.shape[1]}", "Ask about the same batch")  # fmt: skip
    states_BATC = torch.where(valid_BT[:, None, :, None], states_BATC, 0.0)
    if term.relation_heads is None:
        rows_BRTW = states_BATC
    else:
        merged_BTD = states_BATC.transpose(1, 2).flatten(2)
        if merged_BTD.shape[-1] % term.relation_heads:
            raise ConfigError("objective.relation.relation_heads",
                              f"{term.relation_heads} does not divide the width {merged_BTD.shape[-1]}",
                              "Give a number that divides the widths of Q, K and V of both models")  # fmt: skip
        rows_BRTW = merged_BTD.view(*merged_BTD.shape[:2], term.relation_heads, -1).transpose(1, 2)
    if term.form is RelationForm.COSINE:
        wide = torch.promote_types(rows_BRTW.dtype, torch.float32)
        unit_BRTW = normalize(rows_BRTW.to(wide), dim=-1, eps=_NORM_EPS) * math.sqrt(1 / term.temperature)
        return unit_BRTW.to(rows_BRTW.dtype)
    return rows_BRTW * math.sqrt(1 / (math.sqrt(rows_BRTW.shape[-1]) * term.temperature))


def relation_log_probabilities(rows_BRTW: Tensor, allowed_B1TT: Tensor) -> Tensor:
    """log softmax over the allowed columns of rows . rows', at least fp32, [B, R, T, T]."""
    logits_BRTT = rows_BRTW @ rows_BRTW.transpose(-1, -2)
    logits_BRTT = logits_BRTT.to(torch.promote_types(logits_BRTT.dtype, torch.float32))
    return logits_BRTT.masked_fill(~allowed_B1TT, MASKED).log_softmax(-1)


def _row_kl_sum(student_BRTW: Tensor, teacher_BRTW: Tensor, allowed_B1TT: Tensor, valid_BT: Tensor) -> Tensor:
    """Sum of KL(teacher || student) over the heads given and the valid rows."""
    with torch.no_grad():
        teacher_log_BRTT = relation_log_probabilities(teacher_BRTW, allowed_B1TT)
    row_kl_BRT = kl_divergence(teacher_log_BRTT, relation_log_probabilities(student_BRTW, allowed_B1TT))
    return valid_sum(row_kl_BRT, valid_BT.unsqueeze(1))


def _relation_kl(
    student_BATC: Tensor, teacher_BATC: Tensor, allowed_B1TT: Tensor, valid_BT: Tensor, term: RelationTerm
) -> Tensor:
    """Sum over valid rows of the mean over relation heads of the row KL, for one of Q, K, V."""
    student_BRTW = relation_rows(student_BATC, valid_BT, term)
    with torch.no_grad():
        teacher_BRTW = relation_rows(teacher_BATC, valid_BT, term)
    heads = student_BRTW.shape[1]
    if teacher_BRTW.shape[1] != heads:
        raise ModelError("attention relations", f"{heads} heads of the student, {teacher_BRTW.shape[1]} of the teacher",
                         "Set objective.relation.relation_heads to split both anew")  # fmt: skip
    size = term.heads_per_chunk
    if fused.runs_on(student_BRTW):
        total = row_kl_sum(student_BRTW, teacher_BRTW, allowed_B1TT, valid_BT, size)
    else:
        chunks = zip(torch.split(student_BRTW, size, dim=1), torch.split(teacher_BRTW, size, dim=1), strict=True)
        total = torch.stack(
            [
                checkpoint(_row_kl_sum, s, t, allowed_B1TT, valid_BT, use_reentrant=False, preserve_rng_state=False)
                for s, t in chunks
            ]
        ).sum()
    return total / (heads * heads if term.divide_by_heads else heads)


def attention_relation_loss(
    student: AttentionStates,
    teacher: AttentionStates,
    valid_BT: Tensor,
    term: RelationTerm,
    *,
    segment_BT: Tensor | None = None,
    total_rows: Tensor | float | None = None,
) -> Tensor:
    """Mean over valid rows of sum_A alpha_A * KL(teacher's relations || student's), an fp32 scalar without weight.

    valid_BT    bool, False on padding
    segment_BT  int32 document of each token: documents are kept apart; None: one document per sequence
    total_rows  divides the sum over rows; None: valid_BT's own number (`reduction.Totals.present` for an exact mean
                over micro-batches and ranks)
    No gradient flows to the teacher.  Layers may differ in number and width; relation_heads bridges the widths.
    """
    allowed_B1TT = allowed_pairs(valid_BT, segment_BT=segment_BT, causal=term.causal)
    triples = (
        (term.query, student.q_BHTC, teacher.q_BHTC),
        (term.key, student.k_BJTC, teacher.k_BJTC),
        (term.value, student.v_BJTC, teacher.v_BJTC),
    )
    total = torch.stack(
        [alpha * _relation_kl(s, t, allowed_B1TT, valid_BT, term) for alpha, s, t in triples if alpha > 0]
    ).sum()
    return divide(total, valid_BT.sum() if total_rows is None else total_rows)
