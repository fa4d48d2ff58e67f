"""The one-kernel comparison against the pure functions: on a GPU as it runs, elsewhere in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from bitdistill_ray.errors import TeacherError
from bitdistill_ray.losses import fused
from bitdistill_ray.losses.chunked import compared_sums
from bitdistill_ray.losses.objective import GammaMode, Objective, RelationTerm, Scope, Term, TermKind
from bitdistill_ray.losses.relation import attention_relation_loss
from bitdistill_ray.losses.teacher_view import DenseView, TopKView
from bitdistill_ray.losses.terms import Comparison
from tests.losses.cases import B, T, attention

pytestmark = pytest.mark.slow  # seconds of arithmetic; `make test-fast` stays under two minutes without it

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS, VOCABULARY = 12, 2 * fused.BLOCK + 904  # the last block is ragged
CE, CAKLD = Term(kind=TermKind.CE, weight=0.3), TermKind.CAKLD
OBJECTIVES = {
    "ce": (CE,),
    "forward": (Term(kind=TermKind.FORWARD_KL),),
    "reverse": (Term(kind=TermKind.REVERSE_KL, weight=2.0),),
    "cakld": (Term(kind=CAKLD, gamma_mode=GammaMode.FIXED),),
    "cakld per token": (Term(kind=CAKLD, gamma_mode=GammaMode.PER_TOKEN), CE),
    "two temperatures": (
        CE,
        Term(kind=TermKind.FORWARD_KL, weight=10, temperature=5, tau_squared=True, scope=Scope.PRESENT),
        Term(kind=TermKind.REVERSE_KL, temperature=0.7),
    ),
}


def chunk(dtype: torch.dtype, *, forbid: bool = False) -> tuple[torch.Tensor, DenseView, torch.Tensor, torch.Tensor]:
    """A student's logits, a teacher's beside them, labels (some without), and present tokens (one is padding)."""
    g = torch.Generator().manual_seed(5)
    student = torch.randn(TOKENS, VOCABULARY, generator=g) * 4
    teacher = student + torch.randn(TOKENS, VOCABULARY, generator=g)
    labels = torch.randint(VOCABULARY, (TOKENS,), generator=g)
    labels[[1, TOKENS - 1]] = -100
    if forbid:
        teacher[:, ::3] = -torch.inf
        teacher[torch.arange(TOKENS), labels.clamp_min(0)] = 3.0
    present = torch.arange(TOKENS) < TOKENS - 1
    student, teacher = (x.to(DEVICE, dtype) for x in (student, teacher))
    return student, DenseView(teacher), labels.to(DEVICE), present.to(DEVICE)


@pytest.mark.parametrize("forbid", [False, True], ids=["", "forbidden"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_sums_and_gradient_are_those_of_the_pure_functions(name: str, dtype: torch.dtype, forbid: bool) -> None:
    objective, gamma = Objective(terms=OBJECTIVES[name]), 0.3
    student, teacher, labels, present = chunk(dtype, forbid=forbid)
    factors = torch.linspace(0.5, 1.5, len(objective.terms), device=DEVICE)
    sums, grad = fused.sums_and_gradient(Comparison(student, teacher, labels, gamma), present, objective, factors)

    exact = student.double().requires_grad_()
    in_double = DenseView(teacher.logits_nV.double())
    expected = compared_sums(Comparison(exact, in_double, labels, gamma), present, objective)
    (expected * factors).sum().backward()
    assert exact.grad is not None
    torch.testing.assert_close(sums.double(), expected.detach().double(), rtol=2e-5, atol=1e-4)
    assert grad.dtype is dtype
    launches = len({term.temperature for term in objective.terms})  # in 16 bits each rounds what it adds to
    rounding = 1e-5 if dtype is torch.float32 else launches * 2**-8
    torch.testing.assert_close(grad.double(), exact.grad, rtol=rounding, atol=rounding * float(exact.grad.abs().max()))
    assert not grad[-1].any(), "padding has no gradient"


def test_cross_entropy_needs_no_teacher() -> None:
    student, _, labels, present = chunk(torch.float32)
    factors = torch.ones(1, device=DEVICE)
    sums, _ = fused.sums_and_gradient(Comparison(student, None, labels, None), present, Objective(terms=(CE,)), factors)
    expected = torch.nn.functional.cross_entropy(student, labels, reduction="sum")
    torch.testing.assert_close(sums, expected.reshape(1), rtol=1e-5, atol=1e-4)


def test_a_teacher_of_another_vocabulary_is_refused() -> None:
    student, teacher, labels, present = chunk(torch.float32)
    objective, factors = Objective(terms=OBJECTIVES["forward"]), torch.ones(1, device=DEVICE)
    shorter = DenseView(teacher.logits_nV[:, :-1])
    with pytest.raises(TeacherError, match="share tokenizer and vocabulary"):
        fused.sums_and_gradient(Comparison(student, shorter, labels, None), present, objective, factors)


def test_what_it_does_not_cover_goes_the_general_way() -> None:
    ce, forward = Objective(terms=(CE,)), Objective(terms=OBJECTIVES["forward"])
    tempered = Term(kind=CAKLD, gamma_mode=GammaMode.PER_TOKEN, temperature=2.0)
    dense = DenseView(torch.zeros(2, 8))
    topk = TopKView(torch.zeros(2, 2, dtype=torch.int32), torch.zeros(2, 2))
    assert fused.covers_terms(dense, ce)
    assert fused.covers_terms(dense, forward)
    assert fused.covers_terms(None, ce)
    assert not fused.covers_terms(None, forward)
    assert not fused.covers_terms(topk, forward)
    assert not fused.covers_terms(dense, Objective(terms=(Term(kind=TermKind.JSD),)))
    assert not fused.covers_terms(dense, Objective(terms=(tempered,)))
    assert not fused.covers(Comparison(torch.zeros(2, 8), dense, torch.zeros(2), None), ce), "without a GPU"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("heads", "causal"), [(None, False), (4, True)], ids=["own heads", "4 causal ones"])
def test_relations_are_those_of_the_general_way(
    heads: int | None, causal: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With padding and two documents in a row, and heads in chunks of which the last is smaller."""
    term = RelationTerm(weight=1.0, relation_heads=heads, causal=causal, heads_per_chunk=3, temperature=0.2)
    valid = torch.ones(B, T, dtype=torch.bool, device=DEVICE)
    valid[0, -3:] = False
    segment = (torch.arange(T, device=DEVICE) > 4).int().expand(B, T)

    def loss(kernel: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
        monkeypatch.setattr(fused, "runs_on", lambda tensor: kernel)
        student, teacher = attention(0), attention(10)
        states = [x.to(DEVICE, dtype).requires_grad_() for x in (student.q_BHTC, student.k_BJTC, student.v_BJTC)]
        student.q_BHTC, student.k_BJTC, student.v_BJTC = states
        teacher.q_BHTC, teacher.k_BJTC, teacher.v_BJTC = (
            x.to(DEVICE, dtype) for x in (teacher.q_BHTC, teacher.k_BJTC, teacher.v_BJTC)
        )
        value = attention_relation_loss(student, teacher, valid, term, segment_BT=segment)
        return value.detach(), list(torch.autograd.grad(3.0 * value, states))

    expected, expected_grads = loss(kernel=False)
    value, grads = loss(kernel=True)
    rounding = 1e-5 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(value, expected, rtol=rounding, atol=0)
    for found, wanted in zip(grads, expected_grads, strict=True):
        assert float((found - wanted).norm() / wanted.norm()) < 2 * rounding
