"""Divergences against their definitions, gradients against closed forms in float64, and the traps of underflow."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bitdistill_ray.losses.cakld import cakld
from bitdistill_ray.losses.divergence import cross_entropy, forward_kl, jsd, reverse_kl
from tests.losses.cases import Reference, V, logits

STUDENT, TEACHER = logits(seed=0), logits(seed=1)
LABELS = torch.tensor([3, 0, 28, 7, 7, 15])
REFERENCE = Reference(STUDENT, TEACHER, LABELS)


def gradient(values_n: Tensor, student_nV: Tensor) -> Tensor:
    return torch.autograd.grad(values_n.sum(), student_nV)[0]


@pytest.mark.parametrize("tau", [1.0, 0.5, 5.0])
def test_values_are_the_definitions(tau: float) -> None:
    torch.testing.assert_close(forward_kl(STUDENT, TEACHER, temperature=tau), REFERENCE.forward_kl(tau))
    torch.testing.assert_close(reverse_kl(STUDENT, TEACHER, temperature=tau), REFERENCE.reverse_kl(tau))
    squared = forward_kl(STUDENT, TEACHER, temperature=tau, tau_squared=True)
    torch.testing.assert_close(squared, REFERENCE.forward_kl(tau) * tau**2)


def test_cross_entropy_is_the_definition() -> None:
    torch.testing.assert_close(cross_entropy(STUDENT, LABELS), REFERENCE.ce())
    labels_n = LABELS.clone()
    labels_n[2] = -100
    values_n = cross_entropy(STUDENT, labels_n)
    assert values_n[2] == 0
    torch.testing.assert_close(values_n[:2], REFERENCE.ce()[:2])


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_generalised_jsd(beta: float) -> None:
    torch.testing.assert_close(jsd(STUDENT, TEACHER, beta=beta), REFERENCE.jsd(beta))
    torch.testing.assert_close(jsd(STUDENT, TEACHER, beta=beta), jsd(TEACHER, STUDENT, beta=1 - beta))


def test_jsd_tends_to_both_kls() -> None:
    """JSD / beta -> KL(T || S) for beta -> 0, JSD / (1 - beta) -> KL(S || T) for beta -> 1: which side is which."""
    torch.testing.assert_close(jsd(STUDENT, TEACHER, beta=1e-7) / 1e-7, REFERENCE.forward_kl(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        jsd(STUDENT, TEACHER, beta=1 - 1e-7) / 1e-7, REFERENCE.reverse_kl(), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_gradients_are_the_closed_forms(tau: float) -> None:
    """d forward / dz = (S - T) / tau;  d reverse / dz = S * (log S - log T - KL) / tau;  d ce / dz = S - onehot."""
    student_nV = STUDENT.clone().requires_grad_()
    s, t = REFERENCE.probabilities(tau)
    torch.testing.assert_close(gradient(forward_kl(student_nV, TEACHER, temperature=tau), student_nV), (s - t) / tau)
    reverse = s * ((s / t).log() - REFERENCE.reverse_kl(tau)[:, None]) / tau
    torch.testing.assert_close(gradient(reverse_kl(student_nV, TEACHER, temperature=tau), student_nV), reverse)
    onehot = F.one_hot(LABELS, V)
    torch.testing.assert_close(gradient(cross_entropy(student_nV, LABELS), student_nV), STUDENT.softmax(-1) - onehot)


def test_gradcheck() -> None:
    student_nV = STUDENT[:2, :7].clone().requires_grad_()
    teacher_nV = TEACHER[:2, :7]
    for function in (
        lambda s: forward_kl(s, teacher_nV, temperature=2.0, tau_squared=True),
        lambda s: reverse_kl(s, teacher_nV, temperature=2.0),
        lambda s: jsd(s, teacher_nV, beta=0.3),
        lambda s: cakld(s, teacher_nV, 0.7),
        lambda s: cakld(s, teacher_nV, torch.tensor([0.2, 0.9], dtype=torch.float64)),
        lambda s: cross_entropy(s, torch.tensor([1, -100])),
    ):
        assert torch.autograd.gradcheck(function, (student_nV,))


DIVERGENCES = {
    "forward": forward_kl,
    "reverse": reverse_kl,
    "jsd": jsd,
    "cakld": lambda s, t: cakld(s, t, 0.6),
}


def test_the_trap_is_real() -> None:
    """What the authors' code computes is finite, and its gradient is not: the reason for log space."""
    student_nV = torch.tensor([[0.0, 300.0, 1.0]], requires_grad=True)
    teacher_nV = torch.tensor([[1.0, 0.0, 2.0]])
    naive = F.kl_div(teacher_nV.log_softmax(-1), student_nV.softmax(-1), reduction="none").sum()
    assert naive.isfinite()
    assert not torch.autograd.grad(naive, student_nV)[0].isfinite().all()


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("gap", [120.0, 300.0, 3000.0])
def test_underflow_gives_finite_and_right_gradients(name: str, gap: float) -> None:
    """Either side has probabilities that are exactly 0 in fp32; the gradient is that of float64."""
    student = torch.tensor([[0.0, gap, 1.0], [0.5, 0.0, 1.0], [gap, 0.0, 1.0]])
    teacher = torch.tensor([[1.0, 0.0, 2.0], [0.0, gap, 1.0], [0.0, gap, 1.0]])
    narrow, wide = student.clone().requires_grad_(), student.double().requires_grad_()
    values = DIVERGENCES[name](narrow, teacher)
    assert values.isfinite().all()
    found = gradient(values, narrow)
    assert found.isfinite().all()
    exact = gradient(DIVERGENCES[name](wide, teacher.double()), wide)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=gap * 2e-7)  # eps of the KL itself


@pytest.mark.parametrize("name", DIVERGENCES)
def test_teacher_may_forbid_tokens(name: str) -> None:
    """Logits of -inf (a padded vocabulary): finite values and gradients; the forward KL is that of the rest."""
    teacher = TEACHER.clone()
    teacher[:, -4:] = -torch.inf
    student = STUDENT.clone().requires_grad_()
    values = DIVERGENCES[name](student, teacher)
    assert values.isfinite().all()
    assert gradient(values, student).isfinite().all()
    s, t = STUDENT.log_softmax(-1)[:, :-4], TEACHER[:, :-4].log_softmax(-1)
    torch.testing.assert_close(forward_kl(student, teacher), (t.exp() * (t - s)).sum(-1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_16_bit_logits_are_computed_in_fp32(name: str, dtype: torch.dtype) -> None:
    """The only rounding is that of the inputs: equal to float64 on the rounded logits, also at a temperature."""
    student, teacher = STUDENT.to(dtype), TEACHER.to(dtype)
    values = DIVERGENCES[name](student, teacher)
    assert values.dtype is torch.float32
    torch.testing.assert_close(
        values.double(), DIVERGENCES[name](student.double(), teacher.double()), rtol=1e-5, atol=1e-6
    )
    warm = forward_kl(student, teacher, temperature=3.0)
    wide = forward_kl(student.double(), teacher.double(), temperature=3.0)
    torch.testing.assert_close(warm.double(), wide, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_zero_where_equal_and_no_gradient_to_the_teacher(name: str) -> None:
    student, teacher = STUDENT.clone().requires_grad_(), TEACHER.clone().requires_grad_()
    same = DIVERGENCES[name](student, STUDENT + 7.0)  # logits are defined up to a constant
    torch.testing.assert_close(same, torch.zeros_like(same))
    assert gradient(same, student).abs().max() < 1e-12
    DIVERGENCES[name](student, teacher).sum().backward()
    assert teacher.grad is None
    assert (DIVERGENCES[name](STUDENT, TEACHER) > 0.1).all()


def test_cakld_is_the_stated_mix() -> None:
    """gamma weighs the *reverse* KL (student first)."""
    torch.testing.assert_close(cakld(STUDENT, TEACHER, 1.0), REFERENCE.reverse_kl())
    torch.testing.assert_close(cakld(STUDENT, TEACHER, 0.0), REFERENCE.forward_kl())
    gamma_n = torch.linspace(0, 1, 6, dtype=torch.float64)
    torch.testing.assert_close(cakld(STUDENT, TEACHER, gamma_n), REFERENCE.cakld(gamma_n))


def test_cakld_clamps_gamma_and_gives_it_no_gradient() -> None:
    """The authors' estimate could reach 1.1, which makes the forward KL's weight negative."""
    torch.testing.assert_close(cakld(STUDENT, TEACHER, 1.1), REFERENCE.reverse_kl())
    gamma_n = torch.full((6,), -0.5, dtype=torch.float64, requires_grad=True)
    values = cakld(STUDENT.clone().requires_grad_(), TEACHER, gamma_n)
    torch.testing.assert_close(values, REFERENCE.forward_kl())
    values.sum().backward()
    assert gamma_n.grad is None
