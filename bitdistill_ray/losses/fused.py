"""The comparison of logits on a GPU in one kernel (`comparison_kernel.py`): sums of all terms, and their gradient.

It covers what training is mostly made of: cross-entropy, forward and reverse KL and CAKLD against logits over the whole
vocabulary (payloads `hidden` and `logits`), at any temperatures.  JSD, top-k, draws and losses that others register go
the general way, `chunked.compared_sums`, which is also what the kernel is tested against.

Terms of one temperature share a launch; each further temperature is one more.  `row_kl` is the same kernel for
relations (`relation_gradient.py`).

Shapes: those of divergence.py    S terms
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from bitdistill_ray.errors import ConfigError, TeacherError
from bitdistill_ray.losses.divergence import tau_factor
from bitdistill_ray.losses.objective import GammaMode, Objective, Scope, Term, TermKind
from bitdistill_ray.losses.reduction import valid_sum
from bitdistill_ray.losses.teacher_view import DenseView, TeacherView

BLOCK = 2048  # entries of a row read at a time
WARPS = 8  # 4 where a row is one block; both the fastest of seven tried on an H100
FORWARD, REVERSE, LABEL, MIXED = range(4)  # columns of the kernel's weights; the first three are also its values
COLUMN: Mapping[str, int] = {
    TermKind.CE: LABEL,
    TermKind.FORWARD_KL: FORWARD,
    TermKind.REVERSE_KL: REVERSE,
    TermKind.CAKLD: MIXED,
}


@cache
def _kernel_is_there() -> bool:
    return find_spec("triton") is not None


def runs_on(tensor: Tensor) -> bool:
    """Whether the kernel reads this tensor: on a GPU, where Triton is installed, up to fp32."""
    return tensor.is_cuda and tensor.dtype is not torch.float64 and _kernel_is_there()


def covers(student_nV: Tensor, teacher: TeacherView | None, objective: Objective) -> bool:
    """Whether the kernel makes these terms on this device."""
    return runs_on(student_nV) and covers_terms(teacher, objective)


def covers_terms(teacher: TeacherView | None, objective: Objective) -> bool:
    """Whether the kernel knows all terms, and both sides show what it needs."""
    dense = isinstance(teacher, DenseView) or (teacher is None and not objective.needs_distribution)
    return dense and all(
        term.kind in COLUMN and (term.gamma_mode is not GammaMode.PER_TOKEN or term.temperature == 1.0)
        for term in objective.terms
    )


@torch.no_grad()
def sums_and_gradient(
    student_nV: Tensor,
    teacher: DenseView | None,
    labels_n: Tensor,
    present_n: Tensor,
    objective: Objective,
    gamma: float | Tensor | None,
    factors_S: Tensor,
) -> tuple[Tensor, Tensor]:
    """(sums over the tokens of each term, fp32 [S]; gradient of `factors_S` times them, [n, V] in student_nV's dtype).

    The sums are those of `chunked.compared_sums` for the same Comparison; `covers` must have agreed.
    """
    student_nV = student_nV.contiguous()
    teacher_nV = None if teacher is None else teacher.logits_nV.contiguous()
    if teacher_nV is not None and teacher_nV.shape != student_nV.shape:
        raise TeacherError("teacher vocabulary",
                           f"{teacher_nV.shape[-1]} logits, the student has {student_nV.shape[-1]}",
                           "Use a teacher and a student that share tokenizer and vocabulary size")  # fmt: skip
    grad_nV, scopes = torch.empty_like(student_nV), [_scope(term, labels_n, present_n) for term in objective.terms]
    sums: list[Tensor] = [factors_S.new_zeros(())] * len(objective.terms)
    temperatures = sorted({term.temperature for term in objective.terms})
    for launch, temperature in enumerate(temperatures):
        here = [i for i, term in enumerate(objective.terms) if term.temperature == temperature]
        weights_n4 = torch.zeros(len(labels_n), 4, device=student_nV.device, dtype=torch.float32)
        for i in here:
            term = objective.terms[i]
            factor = factors_S[i].float() * tau_factor(temperature, term.tau_squared)
            weights_n4[:, COLUMN[term.kind]] += torch.where(scopes[i], factor, 0.0)
        mode = next((m for i in here if (m := objective.terms[i].gamma_mode) is not None), None)
        gamma_n = _gamma(mode, gamma, weights_n4[:, MIXED])
        values_n3 = _compare_rows(
            student_nV, teacher_nV, labels_n, weights_n4, gamma_n, grad_nV,
            temperature=temperature, gamma_of_label=mode is GammaMode.PER_TOKEN, accumulate=launch > 0,
        )  # fmt: skip
        for i in here:
            value_n = _value(objective.terms[i], values_n3, gamma_n)
            sums[i] = valid_sum(value_n, scopes[i]) * tau_factor(temperature, objective.terms[i].tau_squared)
    return torch.stack(sums), grad_nV


def _scope(term: Term, labels_n: Tensor, present_n: Tensor) -> Tensor:
    return labels_n >= 0 if term.scope is Scope.TARGETS else present_n


def _gamma(mode: GammaMode | None, gamma: float | Tensor | None, like_n: Tensor) -> Tensor:
    """fp32 [n]: the scalar of the run; zeros where there is none, or where the kernel writes the label's own."""
    gamma_n = torch.zeros_like(like_n)
    if mode is None or mode is GammaMode.PER_TOKEN:
        return gamma_n
    if gamma is None:
        raise ConfigError("objective.cakld.gamma_mode", f"{mode}, and no gamma was given",
                          "Measure it with estimate_gamma before the run, or use per-token")  # fmt: skip
    return gamma_n + torch.as_tensor(gamma, device=like_n.device, dtype=torch.float32).clamp(0.0, 1.0)


def _value(term: Term, values_n3: Tensor, gamma_n: Tensor) -> Tensor:
    """fp32 [n]: one term's value of each token, without tau**2."""
    if term.kind == TermKind.CAKLD:
        return gamma_n * values_n3[:, REVERSE] + (1.0 - gamma_n) * values_n3[:, FORWARD]
    return values_n3[:, COLUMN[term.kind]]


@torch.no_grad()
def row_kl(student_nV: Tensor, teacher_nV: Tensor, weights_n: Tensor) -> tuple[Tensor, Tensor]:
    """(KL(teacher || student) of each row, fp32 [n]; gradient of `weights_n` times them, [n, V] in student_nV's dtype).

    Rows of logits; both sides may have columns that are left out, at -1e30.
    """
    weights_n4 = torch.zeros(len(weights_n), 4, device=student_nV.device, dtype=torch.float32)
    weights_n4[:, FORWARD] = weights_n
    grad_nV, unused_n = torch.empty_like(student_nV), weights_n4[:, MIXED].contiguous()
    labels_n = torch.full((len(weights_n),), -1, device=student_nV.device)
    values_n3 = _compare_rows(student_nV, teacher_nV, labels_n, weights_n4, unused_n, grad_nV)
    return values_n3[:, FORWARD], grad_nV


def _compare_rows(
    student_nV: Tensor,
    teacher_nV: Tensor | None,
    labels_n: Tensor,
    weights_n4: Tensor,
    gamma_n: Tensor,
    grad_nV: Tensor,
    *,
    temperature: float = 1.0,
    gamma_of_label: bool = False,
    accumulate: bool = False,
) -> Tensor:
    """Launch the kernel: writes (or adds to) `grad_nV`; returns F, R and C of each row, fp32 [n, 3]."""
    from bitdistill_ray.losses.comparison_kernel import compare_rows  # Triton is there on GPU hosts only

    tokens, vocabulary = student_nV.shape
    values_n3 = torch.empty(tokens, 3, device=student_nV.device, dtype=torch.float32)
    compare_rows[(tokens,)](
        student_nV, student_nV if teacher_nV is None else teacher_nV, labels_n, weights_n4, gamma_n, values_n3,
        grad_nV, vocabulary, 1.0 / temperature, TEACHER=teacher_nV is not None, GAMMA_OF_LABEL=gamma_of_label,
        ACCUMULATE=accumulate, BLOCK=min(BLOCK, 1 << (vocabulary - 1).bit_length()),
        num_warps=WARPS if vocabulary > BLOCK else WARPS // 2,
    )  # fmt: skip
    return values_n3
