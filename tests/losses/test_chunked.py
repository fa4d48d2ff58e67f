"""The chunked objective equals its definition on full logits: values, gradients, every payload and objective."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitdistill_ray.core import TeacherSignals, TokenBatch
from bitdistill_ray.errors import ConfigError, ModelError, TeacherError
from bitdistill_ray.losses.chunked import chunked_loss
from bitdistill_ray.losses.objective import (
    GammaMode,
    Loss,
    Objective,
    Reduction,
    RelationTerm,
    Scope,
    Term,
    TermKind,
)
from bitdistill_ray.losses.reduction import Totals
from bitdistill_ray.losses.relation import attention_relation_loss
from bitdistill_ray.losses.terms import Comparison, token_loss
from tests.losses.cases import (
    CE,
    GAMMA,
    OBJECTIVES,
    B,
    D,
    Reference,
    T,
    V,
    attention,
    generator,
    heads,
    hidden,
    signals_of,
    token_batch,
)

BATCH = token_batch()


def expected(objective: Objective, student_nV: Tensor, teacher_nV: Tensor, batch: TokenBatch) -> Tensor:
    """The objective from the definitions, on full float64 logits."""
    labels_n = batch.labels_BT.flatten()
    reference = Reference(student_nV, teacher_nV, labels_n)
    total = torch.zeros((), dtype=torch.float64)
    for term in objective.terms:
        gamma = reference.label_probability() if term.gamma_mode is GammaMode.PER_TOKEN else GAMMA
        values_n = {
            "ce": lambda: reference.ce(),
            "forward_kl": lambda term=term: reference.forward_kl(term.temperature),
            "reverse_kl": lambda term=term: reference.reverse_kl(term.temperature),
            "jsd": lambda term=term: reference.jsd(term.beta),
            "cakld": lambda gamma=gamma: reference.cakld(gamma),
        }[term.kind]()
        mask_n = labels_n >= 0 if term.scope is Scope.TARGETS else batch.segment_BT.flatten() >= 0
        divisor = len(batch.sequence_ids) if objective.reduction is Reduction.SEQUENCE_SUM else mask_n.sum()
        factor = term.weight * (term.temperature**2 if term.tau_squared else 1)
        total = total + factor * values_n[mask_n].sum() / divisor
    return total


def run(
    objective: Objective, payload: str = "hidden", *, chunk_tokens: int = 5, batch: TokenBatch = BATCH, **options: Any
) -> tuple[Loss, Tensor, nn.Linear]:
    student_head, teacher_head = heads()
    hidden_BTD = hidden(0).requires_grad_()
    loss = chunked_loss(
        hidden_BTD, student_head, signals_of(payload, hidden(1), teacher_head), teacher_head, batch.labels_BT,
        objective, chunk_tokens=chunk_tokens, gamma=GAMMA, segment_BT=batch.segment_BT, **options,
    )  # fmt: skip
    return loss, hidden_BTD, student_head


@pytest.mark.parametrize("payload", ["hidden", "logits"])
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("chunk_tokens", [1, 5, 22, 1000])
def test_equals_the_definition(payload: str, name: str, chunk_tokens: int) -> None:
    loss, hidden_BTD, student_head = run(OBJECTIVES[name], payload, chunk_tokens=chunk_tokens)
    loss.value.backward()

    student, teacher_head = heads()
    student, wide_BTD = student.double(), hidden(0).double().requires_grad_()
    teacher_nV = teacher_head(hidden(1)).flatten(0, 1)
    reference = expected(OBJECTIVES[name], student(wide_BTD).flatten(0, 1), teacher_nV, BATCH)
    reference.backward()

    assert loss.value.dtype is torch.float32
    torch.testing.assert_close(loss.value.double(), reference, rtol=1e-5, atol=1e-6)
    for found, wanted in ((hidden_BTD.grad, wide_BTD.grad), (student_head.weight.grad, student.weight.grad)):
        assert found is not None
        assert wanted is not None
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=2e-6)


def test_parts_are_unweighted_and_add_up_to_the_value() -> None:
    for objective in OBJECTIVES.values():
        loss, *_ = run(objective)
        assert set(loss.parts) == {term.name for term in objective.terms}
        assert not any(part.requires_grad for part in loss.parts.values())
        weighted = sum((term.weight * loss.parts[term.name] for term in objective.terms), torch.zeros(()))
        torch.testing.assert_close(loss.value.detach(), weighted)
        assert int(loss.tokens) == int((BATCH.labels_BT >= 0).sum())


@pytest.mark.parametrize("name", ["bitdistiller", "jsd+reverse", "angelslim"])
def test_topk_payload(name: str) -> None:
    """k = V is exact; k = 5 gives the divergence between six classes, from the definition."""
    full, *_ = run(OBJECTIVES[name])
    student_head, teacher_head = heads()
    for k in (V, 5):
        hidden_BTD = hidden(0).requires_grad_()
        loss = chunked_loss(
            hidden_BTD, student_head, signals_of("topk", hidden(1), teacher_head, k), None, BATCH.labels_BT,
            OBJECTIVES[name], chunk_tokens=5, gamma=GAMMA, segment_BT=BATCH.segment_BT,
        )  # fmt: skip
        loss.value.backward()
        assert hidden_BTD.grad is not None
        assert hidden_BTD.grad.isfinite().all()
        if k == V:
            torch.testing.assert_close(loss.value, full.value, rtol=1e-4, atol=1e-5)
    if name == "bitdistiller":
        labels_n = BATCH.labels_BT.flatten()
        nV = (head(h).flatten(0, 1) for head, h in ((student_head, hidden(0)), (teacher_head, hidden(1))))
        s, t = Reference(*nV, labels_n).coarse(5)
        wanted = (GAMMA * s * (s / t).log() + (1 - GAMMA) * t * (t / s).log()).sum(-1)[labels_n >= 0].mean()
        torch.testing.assert_close(loss.value.double(), wanted, rtol=1e-4, atol=1e-5)


def test_tied_head_gets_both_gradients() -> None:
    """The embedding is the head: its gradient is that of the lookup plus that of every chunk."""
    _, teacher_head = heads()
    objective = OBJECTIVES["bitdistill"]
    gradients = []
    for dtype, chunked in ((torch.float32, True), (torch.float64, False)):
        table = torch.randn(V, D, generator=generator(7)).to(dtype).requires_grad_()
        states_BTD = nn.functional.embedding(BATCH.ids_BT, table).cumsum(1)
        if chunked:
            value = chunked_loss(
                states_BTD, lambda h, w=table: h @ w.T, signals_of("hidden", hidden(1), teacher_head), teacher_head,
                BATCH.labels_BT, objective, chunk_tokens=6, segment_BT=BATCH.segment_BT,
            ).value  # fmt: skip
        else:
            teacher_nV = teacher_head(hidden(1)).flatten(0, 1)
            value = expected(objective, (states_BTD @ table.T).flatten(0, 1), teacher_nV, BATCH)
        gradients.append(torch.autograd.grad(value, table)[0].double())
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)


def test_with_relations() -> None:
    """BitNet Distillation, stage 3, whole: CE, LD and AD; the AD is the relation loss over present positions."""
    relation = RelationTerm(weight=100.0, relation_heads=4, divide_by_heads=True)
    objective = replace(OBJECTIVES["bitdistill"], relation=relation)
    student_head, teacher_head = heads()
    signals = signals_of("hidden", hidden(1), teacher_head)
    signals.attention = attention(10)
    states = attention(0)
    states.q_BHTC.requires_grad_()
    loss = chunked_loss(
        hidden(0), student_head, signals, teacher_head, BATCH.labels_BT, objective,
        chunk_tokens=5, segment_BT=BATCH.segment_BT, student_attention=states,
    )  # fmt: skip
    tokens, *_ = run(OBJECTIVES["bitdistill"])
    ad = attention_relation_loss(states, attention(10), BATCH.segment_BT >= 0, relation, segment_BT=BATCH.segment_BT)
    torch.testing.assert_close(loss.value, tokens.value + 100 * ad)
    torch.testing.assert_close(loss.parts["relation"], ad.detach())
    loss.value.backward()
    assert states.q_BHTC.grad is not None
    shared = chunked_loss(
        hidden(0), student_head, signals, teacher_head, BATCH.labels_BT, objective,
        chunk_tokens=5, segment_BT=BATCH.segment_BT, student_attention=states,
        totals=Totals.count(BATCH.labels_BT, BATCH.segment_BT).shared_by(4),
    )  # fmt: skip
    torch.testing.assert_close(shared.value, 4 * loss.value)
    torch.testing.assert_close(shared.parts["relation"], 4 * ad.detach())


def test_trap_label_shift() -> None:
    """hidden[t] answers for token t + 1: exactly the positions before a target, within its document, get gradient.

    Not the position after a document's end (the authors train it), nor prompt positions except the last.
    """
    loss, hidden_BTD, _ = run(OBJECTIVES["bitdistiller"])
    loss.value.backward()
    assert hidden_BTD.grad is not None
    trained = [(b, t) for b in range(B) for t in range(T) if hidden_BTD.grad[b, t].abs().max() > 0]
    wanted = [
        (b, t)
        for b in range(B)
        for t in range(T - 1)
        if BATCH.target_BT[b, t + 1] and BATCH.segment_BT[b, t] == BATCH.segment_BT[b, t + 1]
    ]
    assert trained == wanted
    assert (0, 1) in trained
    assert (0, 4) not in trained  # the end of the first document


@pytest.mark.parametrize("payload", ["hidden", "logits", "topk"])
def test_trap_padding_may_hold_nan(payload: str) -> None:
    """NaN in the padding of both models reaches neither the loss nor any gradient."""
    objective = Objective(terms=(CE, Term(kind=TermKind.REVERSE_KL, scope=Scope.PRESENT)))
    clean, clean_BTD, clean_head = run(objective, payload)
    clean.value.backward()

    student_head, teacher_head = heads()
    padding_BT = (BATCH.segment_BT < 0).unsqueeze(-1)
    signals = signals_of(payload, hidden(1), teacher_head)
    if signals.hidden_BTD is not None:
        signals.hidden_BTD = signals.hidden_BTD.masked_fill(padding_BT, torch.nan)
    if signals.logits_BTV is not None:
        signals.logits_BTV = signals.logits_BTV.masked_fill(padding_BT, torch.nan)
    if signals.topk is not None:
        signals.topk.logprobs_BTS = signals.topk.logprobs_BTS.masked_fill(padding_BT, torch.nan)
    dirty_BTD = hidden(0).masked_fill(padding_BT, torch.nan).requires_grad_()
    loss = chunked_loss(
        dirty_BTD, student_head, signals, teacher_head, BATCH.labels_BT, objective,
        chunk_tokens=5, segment_BT=BATCH.segment_BT,
    )  # fmt: skip
    loss.value.backward()
    torch.testing.assert_close(loss.value, clean.value)
    torch.testing.assert_close(dirty_BTD.grad, clean_BTD.grad)
    torch.testing.assert_close(student_head.weight.grad, clean_head.weight.grad)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_totals_make_ranks_and_micro_batches_one_mean(name: str) -> None:
    """Two ranks with two micro-batches each, of unequal valid tokens, one without any: averaged as data-parallel
    engines do, the gradient is that of one big batch."""
    objective, world, accumulation = OBJECTIVES[name], 2, 2
    student_head, teacher_head = heads()
    ids_BT = torch.randint(0, V, (4, T), generator=generator(5))
    segment_BT = torch.zeros(4, T, dtype=torch.int32)
    segment_BT[1, 4:], segment_BT[2, :] = -1, -1
    big = TokenBatch(ids_BT=ids_BT, target_BT=segment_BT >= 0, segment_BT=segment_BT, sequence_ids=tuple("abcd"))
    teacher_BTD, labels_BT = hidden(1, b=4), big.labels_BT

    def gradient(rows: slice, totals: Totals | None) -> tuple[Tensor, Tensor]:
        student_head.zero_grad()
        loss = chunked_loss(
            hidden(0, b=4)[rows], student_head, signals_of("hidden", teacher_BTD[rows], teacher_head), teacher_head,
            labels_BT[rows], objective, chunk_tokens=4, gamma=GAMMA, segment_BT=segment_BT[rows], totals=totals,
        )  # fmt: skip
        loss.value.backward()
        assert student_head.weight.grad is not None
        return loss.value.detach(), student_head.weight.grad.clone()

    rows = [slice(i, i + 1) for i in range(world * accumulation)]
    counted = [Totals.count(labels_BT[r], segment_BT[r]) for r in rows]
    totals = (counted[0] + counted[1] + counted[2] + counted[3]).shared_by(world * accumulation)
    values, gradients = zip(*(gradient(r, totals) for r in rows), strict=True)
    value, whole = gradient(slice(0, 4), None)
    torch.testing.assert_close(torch.stack(values).mean(), value)
    torch.testing.assert_close(torch.stack(gradients).mean(0), whole, rtol=1e-4, atol=1e-6)
    if name == "ce":
        own = torch.stack([gradient(r, None)[0] for r in rows])
        assert own.isfinite().all()
        assert (own.mean() - value).abs() > 1e-2  # the mean of the ranks' own means is another number


def test_16_bit_students_and_autocast() -> None:
    """bf16 heads under autocast: fp32 losses, near those of fp32, and finite gradients."""
    exact, *_ = run(OBJECTIVES["bitdistill"])
    student_head, teacher_head = heads()
    hidden_BTD = hidden(0).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = chunked_loss(
            hidden_BTD, student_head, signals_of("hidden", hidden(1).half(), teacher_head), teacher_head,
            BATCH.labels_BT, OBJECTIVES["bitdistill"], chunk_tokens=5, segment_BT=BATCH.segment_BT,
        )  # fmt: skip
    loss.value.backward()
    assert loss.value.dtype is torch.float32
    torch.testing.assert_close(loss.value, exact.value, rtol=2e-2, atol=1e-2)
    assert hidden_BTD.grad is not None
    assert hidden_BTD.grad.isfinite().all()


def test_a_new_loss_registers_itself() -> None:
    @token_loss("total_variation")
    def total_variation(tokens: Comparison, term: Term) -> Tensor:
        student_log_nP, teacher_log_nP = tokens.pair(term.temperature)
        return 0.5 * (student_log_nP.exp() - teacher_log_nP.exp()).abs().sum(-1)

    loss, *_ = run(Objective(terms=(Term(kind="total_variation"),)))
    student_head, teacher_head = heads()
    s, t = student_head(hidden(0)).softmax(-1), teacher_head(hidden(1)).softmax(-1)
    torch.testing.assert_close(loss.value, 0.5 * (s - t).abs().sum(-1)[BATCH.labels_BT >= 0].mean())
    with pytest.raises(ConfigError, match="registered twice"):
        token_loss("total_variation")(total_variation)


def test_what_is_missing_is_named() -> None:
    student_head, teacher_head = heads()
    kl = Objective(terms=(Term(kind="forward_kl"),))
    relation = Objective(relation=RelationTerm(weight=1.0))
    signals = signals_of("hidden", hidden(1), teacher_head)

    def call(objective: Objective, signals: TeacherSignals | None, chunk_tokens: int = 5, **options: Any) -> Loss:
        return chunked_loss(
            hidden(0), student_head, signals, teacher_head, BATCH.labels_BT, objective,
            chunk_tokens=chunk_tokens, **options,
        )  # fmt: skip

    with pytest.raises(TeacherError, match="teacher signals: none"):
        call(kl, None)
    with pytest.raises(ConfigError, match="estimate_gamma"):
        call(OBJECTIVES["bitdistiller"], signals)
    with pytest.raises(ConfigError, match="Did you mean forward_kl"):
        call(Objective(terms=(Term(kind="forwards_kl"),)), signals)
    with pytest.raises(ConfigError, match="chunk_tokens"):
        call(kl, signals, chunk_tokens=0)
    with pytest.raises(ModelError, match="no attention states of the student"):
        call(relation, signals)
    with pytest.raises(TeacherError, match="no attention states in the teacher"):
        call(relation, signals, student_attention=attention(0))
