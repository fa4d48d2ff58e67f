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

from bitdistill_ray.losses.cakld import clamped, mixed
from bitdistill_ray.losses.divergence import tau_factor
from bitdistill_ray.losses.objective import GammaMode, Objective, Term, TermKind
from bitdistill_ray.losses.reduction import valid_sum
from bitdistill_ray.losses.teacher_view import DenseView, TeacherView
from bitdistill_ray.losses.terms import Comparison

BLOCK = 2048  # entries of a row read at a time
WARPS = 8  # half where a row is one block; the fastest of seven pairs, and of three counts, tried on an H100
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


def covers(tokens: Comparison, objective: Objective) -> bool:
    """Whether the kernel makes these terms on this device."""
    return runs_on(tokens.student_nV) and covers_terms(tokens.view, objective)


def covers_terms(view: TeacherView | None, objective: Objective) -> bool:
    """Whether the kernel knows all terms, and both sides show what it needs."""
    dense = isinstance(view, DenseView) or (view is None and not objective.needs_distribution)
    return dense and all(
        term.kind in COLUMN and (term.gamma_mode is not GammaMode.PER_TOKEN or term.temperature == 1.0)
        for term in objective.terms
    )


@torch.no_grad()
def sums_and_gradient(
    tokens: Comparison, present_n: Tensor, objective: Objective, factors_S: Tensor
) -> tuple[Tensor, Tensor]:
    """(sums over the tokens of each term, fp32 [S]; gradient of `factors_S` times them, [n, V] in student_nV's dtype).

    The sums are those of `chunked.compared_sums`; `covers` must have agreed.
    """
    student_nV, labels_n = tokens.student_nV.contiguous(), tokens.labels_n
    teacher_nV = tokens.view.logits_beside(student_nV).contiguous() if isinstance(tokens.view, DenseView) else None
    grad_nV, scopes = torch.empty_like(student_nV), [tokens.counted(term, present_n) for term in objective.terms]
    sums: dict[int, Tensor] = {}
    temperatures = sorted({term.temperature for term in objective.terms})
    for launch, temperature in enumerate(temperatures):
        here = [i for i, term in enumerate(objective.terms) if term.temperature == temperature]
        weights_n4 = torch.zeros(len(labels_n), 4, device=student_nV.device, dtype=torch.float32)
        for i in here:
            term = objective.terms[i]
            factor = factors_S[i].float() * tau_factor(temperature, term.tau_squared)
            weights_n4[:, COLUMN[term.kind]] += torch.where(scopes[i], factor, 0.0)
        mode = next((m for i in here if (m := objective.terms[i].gamma_mode) is not None), None)
        gamma_n = torch.zeros_like(weights_n4[:, MIXED])
        if mode is not None and mode is not GammaMode.PER_TOKEN:
            gamma_n += clamped(tokens.gamma(mode), like=gamma_n)
        values_n3 = _compare_rows(
            student_nV, teacher_nV, labels_n, weights_n4, gamma_n, grad_nV, temperature=temperature,
            gamma_of_label=mode is GammaMode.PER_TOKEN, accumulate=launch > 0,
        )  # fmt: skip
        for i in here:
            value_n = _value(objective.terms[i], values_n3, gamma_n)
            sums[i] = valid_sum(value_n, scopes[i]) * tau_factor(temperature, objective.terms[i].tau_squared)
    return torch.stack([sums[i] for i in range(len(sums))]), grad_nV


def _value(term: Term, values_n3: Tensor, gamma_n: Tensor) -> Tensor:
    """fp32 [n]: one term's value of each token, without tau**2."""
    if term.kind == TermKind.CAKLD:
        return mixed(values_n3[:, REVERSE], values_n3[:, FORWARD], gamma_n)
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
