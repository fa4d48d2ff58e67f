"""What a chunk costs: head calls, tensors alive, log-softmaxes, graph breaks."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from bitdistill_ray.core import TeacherSignals
from bitdistill_ray.losses.chunked import chunked_loss
from bitdistill_ray.losses.objective import Objective, Term
from bitdistill_ray.losses.teacher_view import DenseView
from bitdistill_ray.losses.terms import Comparison, term_values
from tests.losses.cases import (
    CE,
    GAMMA,
    OBJECTIVES,
    Allocations,
    B,
    D,
    T,
    V,
    generator,
    heads,
    hidden,
    signals_of,
    token_batch,
)

BATCH = token_batch()


@dataclass(eq=False)
class Saved:
    """A tensor that waits for the backward pass; alive as long as it does."""

    tensor: Tensor


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("valid", [0, 3, 22])
def test_head_calls_do_not_depend_on_the_mask(valid: int, *, sharded: bool) -> None:
    """All ranks call the heads equally often, with equal shapes, whatever their padding: once for each chunk, and once
    more in the backward pass where ZeRO-3 has sharded the head (it gathers in each call)."""
    student_head, teacher_head = heads()
    if sharded:
        student_head.weight.ds_id = 0  # what marks a parameter as ZeRO-3's
    calls: list[tuple[str, int]] = []
    student_head.register_forward_hook(lambda _m, args, _out: calls.append(("student", len(args[0]))))
    teacher_head.register_forward_hook(lambda _m, args, _out: calls.append(("teacher", len(args[0]))))
    labels_n = torch.full((B * T,), -100)
    labels_n[:valid] = 1
    segment_BT = torch.where(labels_n >= 0, 0, -1).view(B, T)
    hidden_BTD = hidden(0).requires_grad_()
    loss = chunked_loss(
        hidden_BTD, student_head, signals_of("hidden", hidden(1), teacher_head), teacher_head, labels_n.view(B, T),
        OBJECTIVES["bitdistill"], chunk_tokens=8, segment_BT=segment_BT,
    )  # fmt: skip
    forward = [call for rows in (8, 8, 6) for call in (("student", rows), ("teacher", rows))]
    assert calls == forward
    loss.value.backward()
    backward = [call for rows in (6, 8, 8) for call in (("student", rows), ("teacher", rows))]
    assert calls == forward + (backward if sharded else [])
    assert loss.value.isfinite()
    if valid == 0:
        assert loss.value == 0
        assert hidden_BTD.grad is not None
        assert (hidden_BTD.grad == 0).all()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_never_holds_the_logits_of_all_tokens(name: str) -> None:
    """512 tokens, V = 601: in chunks of 32 no operation, forward or backward, returns more than a chunk's logits, and
    what waits for the backward pass is no logits at all.  In one chunk it does: the measurement sees them."""
    tokens, v, chunk = 512, 601, 32
    student_head, teacher_head = nn.Linear(D, v), nn.Linear(D, v).requires_grad_(False)
    labels_BT = torch.randint(0, v, (2, tokens // 2))
    largest, waiting = {}, {}
    for chunk_tokens in (chunk, tokens):
        saved: weakref.WeakSet[Saved] = weakref.WeakSet()

        def pack(tensor: Tensor, saved: weakref.WeakSet[Saved] = saved) -> Saved:
            saved.add(kept := Saved(tensor))
            return kept

        hidden_BTD = hidden(0, 2, tokens // 2).requires_grad_()
        signals = TeacherSignals(sequence_ids=("a", "b"), hidden_BTD=hidden(1, 2, tokens // 2))
        with Allocations() as mode, torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
            loss = chunked_loss(
                hidden_BTD, student_head, signals, teacher_head, labels_BT, OBJECTIVES[name],
                chunk_tokens=chunk_tokens, gamma=GAMMA,
            )  # fmt: skip
            waiting[chunk_tokens] = max(kept.tensor.numel() for kept in saved)  # those of finished graphs are gone
            loss.value.backward()
        largest[chunk_tokens] = mode.elements
    assert largest == {chunk: chunk * v, tokens: tokens * v}
    assert waiting[chunk] < chunk * v


def test_log_softmaxes_are_shared_among_terms() -> None:
    """Four terms at one temperature: one log-softmax of the student and one of the teacher per chunk."""
    objective = Objective(terms=(CE, Term(kind="forward_kl"), Term(kind="reverse_kl"), Term(kind="jsd")))
    student_head, teacher_head = heads()
    with torch.no_grad(), torch.profiler.profile() as profile:
        chunked_loss(
            hidden(0), student_head, signals_of("logits", hidden(1), teacher_head), None, BATCH.labels_BT, objective,
            chunk_tokens=22, segment_BT=BATCH.segment_BT,
        )  # fmt: skip
    assert sum(event.name == "aten::_log_softmax" for event in profile.events()) == 2


def test_a_chunk_compiles_without_a_graph_break() -> None:
    """fullgraph: no read-back, no data-dependent branch; values equal eager ones."""
    student_nV, labels_n = torch.randn(6, V, generator=generator(0)), BATCH.labels_BT.flatten()[:6]
    signals = TeacherSignals(sequence_ids=("a",), logits_BTV=torch.randn(1, 6, V, generator=generator(1)))

    def values(student_nV: Tensor, teacher_BTV: Tensor, labels_n: Tensor) -> list[Tensor]:
        terms = OBJECTIVES["angelslim"].terms + OBJECTIVES["jsd+reverse"].terms
        return term_values(Comparison(student_nV, DenseView(teacher_BTV.flatten(0, 1)), labels_n, GAMMA), terms)

    compiled = torch.compile(values, backend="eager", fullgraph=True)
    arguments = (student_nV, signals.logits_BTV, labels_n)
    torch.testing.assert_close(compiled(*arguments), values(*arguments))
