"""The three wire forms: equal where they must be, a lower bound where the top-k tail is one class."""

from __future__ import annotations

import pytest
import torch

from bitdistill_ray.core import Payload, TeacherSignals, TopK
from bitdistill_ray.errors import ConfigError, TeacherError
from bitdistill_ray.losses.divergence import forward_kl, kl_divergence, log_probabilities
from bitdistill_ray.losses.teacher_view import DenseView, TopKView, payload_of, teacher_views
from tests.losses.cases import Reference, V, heads, hidden, logits, signals_of

STUDENT, TEACHER = logits(seed=0), logits(seed=1)
LABELS = torch.tensor([3, 0, 28, 7, -100, 15])


def top_k(k: int, dtype: torch.dtype = torch.float32) -> TopKView:
    top = TEACHER.log_softmax(-1).topk(k)
    return TopKView(top.indices.int(), top.values.to(dtype))


@pytest.mark.parametrize("k", [1, 5, V - 1])
def test_topk_compares_k_plus_one_classes(k: int) -> None:
    student_nP, teacher_nP = top_k(k).compare(STUDENT.float().log_softmax(-1), temperature=1.0)
    s, t = Reference(STUDENT, TEACHER, LABELS).coarse(k)
    torch.testing.assert_close(student_nP.exp().double(), s, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(teacher_nP.exp().double(), t, rtol=1e-5, atol=1e-6)


def test_topk_is_a_lower_bound_that_grows_to_the_exact_kl() -> None:
    """The data-processing inequality, along k; at k = V - 1 the tail is one token and the bound is tight."""
    student_log_nV = log_probabilities(STUDENT.float())
    exact_n = forward_kl(STUDENT.float(), TEACHER.float())
    bounds = []
    for k in (1, 2, 4, 8, 16, V - 1, V):
        student_nP, teacher_nP = top_k(k).compare(student_log_nV, temperature=1.0)
        bounds.append(kl_divergence(teacher_nP, student_nP))
    for lower_n, higher_n in zip(bounds, [*bounds[1:], exact_n], strict=True):
        assert (lower_n <= higher_n + 1e-4).all()
    assert (bounds[2] < 0.99 * exact_n).all()
    torch.testing.assert_close(bounds[-2], exact_n, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(bounds[-1], exact_n, rtol=1e-3, atol=1e-4)


def test_topk_gradient_is_finite_where_the_tail_is_empty() -> None:
    """The student agrees with a certain teacher: log(1 - sum) of fp32 would be -inf here, its gradient NaN."""
    student_nV = torch.zeros(1, V)
    student_nV[0, :2] = torch.tensor([60.0, 59.0])
    student_nV.requires_grad_()
    view = TopKView(torch.tensor([[0, 1]]), torch.tensor([[60.0, 59.0]]).log_softmax(-1))
    student_nP, teacher_nP = view.compare(log_probabilities(student_nV), temperature=1.0)
    for values_n in (kl_divergence(teacher_nP, student_nP), kl_divergence(student_nP, teacher_nP)):
        (grad,) = torch.autograd.grad(values_n.sum(), student_nV, retain_graph=True)
        assert grad.isfinite().all()
        assert grad.abs().max() < 1e-3


def test_topk_rounded_past_one_is_still_a_distribution() -> None:
    """fp16 on the wire may sum to more than 1; the divergence stays >= 0."""
    top = TEACHER.log_softmax(-1).topk(V)
    view = TopKView(top.indices, (top.values + 1e-3).half())
    assert (view.logprobs_nS.float().exp().sum(-1) > 1).all()
    student_nP, teacher_nP = view.compare(log_probabilities(TEACHER.float()), temperature=1.0)
    torch.testing.assert_close(teacher_nP.exp().sum(-1), torch.ones(6))
    assert (kl_divergence(teacher_nP, student_nP) > -1e-6).all()


def test_topk_refuses_other_temperatures() -> None:
    with pytest.raises(ConfigError, match="tail is known at 1"):
        top_k(3).compare(log_probabilities(STUDENT.float(), temperature=5.0), temperature=5.0)


def test_confidences() -> None:
    reference = Reference(STUDENT, TEACHER, LABELS)
    label_n = torch.where(LABELS >= 0, reference.label_probability(), 0.0).float()
    largest_n = reference.probabilities()[1].amax(-1).float()
    for view in (DenseView(TEACHER), top_k(V)):
        torch.testing.assert_close(view.label_probability(LABELS), label_n)
        torch.testing.assert_close(view.largest_probability(), largest_n)


def test_other_vocabulary_is_refused_by_size() -> None:
    with pytest.raises(TeacherError, match="29 logits, the student has 31"):
        DenseView(TEACHER).compare(torch.zeros(6, 31), temperature=1.0)


def test_teacher_head_runs_without_gradient_and_per_chunk() -> None:
    _, head = heads()
    head.requires_grad_()
    rows: list[int] = []
    head.register_forward_hook(lambda _m, args, _out: rows.append(len(args[0])))
    signals = signals_of("hidden", hidden(1), head)
    views = teacher_views(signals, head, tokens=22, chunk_tokens=8)
    assert rows == []
    assert not views[0](torch.ones(8, dtype=torch.bool)).logits_nV.requires_grad
    views[2](torch.ones(6, dtype=torch.bool))
    assert rows == [8, 6]


def test_signals_that_cannot_be_used() -> None:
    _, head = heads()
    good = signals_of("hidden", hidden(1), head)
    assert payload_of(good) is Payload.HIDDEN
    with pytest.raises(TeacherError, match="none"):
        payload_of(TeacherSignals(sequence_ids=("a",)))
    both = TeacherSignals(sequence_ids=("a",), hidden_BTD=good.hidden_BTD, logits_BTV=torch.zeros(1, 2, 3))
    with pytest.raises(TeacherError, match="'hidden', 'logits'"):
        payload_of(both)
    with pytest.raises(TeacherError, match="teacher head"):
        teacher_views(good, None, tokens=22, chunk_tokens=8)
    with pytest.raises(TeacherError, match="the student has 20"):
        teacher_views(good, head, tokens=20, chunk_tokens=8)
    topk = TopK(ids_BTS=torch.zeros(2, 10, 3), logprobs_BTS=torch.zeros(2, 10, 3))
    with pytest.raises(TeacherError, match="the student has 22"):
        teacher_views(TeacherSignals(sequence_ids=("a", "b"), topk=topk), None, tokens=22, chunk_tokens=8)
