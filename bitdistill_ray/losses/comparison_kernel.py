"""Triton kernel: a student's and a teacher's logits of one chunk, read twice, give all sums and the gradient.

One program takes one row (token).  What every term of an Objective is made of, at temperature tau and with
s = log softmax(student / tau), t = log softmax(teacher / tau), q = exp(s), p = exp(t):

    forward  F = sum_v p (t - s)         dF/dz = (q - p) / tau
    reverse  R = sum_v q (s - t)         dR/dz = q (s - t - R) / tau
    label    C = -s[label]               dC/dz = (q - onehot) / tau

The first pass over the row keeps running maxima and sums of exponentials of both sides, and with them R, which its own
gradient needs: with m the student's maximum and L its sum,

    R = sum_v e^(z - m) (z - y) / L - lse(z) + lse(y)            z, y: logits over tau of student and teacher

The second pass makes F, R and C from log-probabilities, as `divergence.py` does, and writes the weighted gradient.
Compiled by TorchInductor the same comparison took 33 ms of a 0.6B student's step on an H100, this takes 12.

What a teacher forbids (-inf) has t = LOG_FLOOR and p = 0, and leaves R's running sum through one of its own, `barred`.

    V vocabulary, read BLOCK entries at a time, each lane with running values of its own
"""

from __future__ import annotations

import triton
import triton.language as tl

from bitdistill_ray.losses import divergence

LOG_FLOOR: tl.constexpr = tl.constexpr(divergence.LOG_FLOOR)
_BARRED: tl.constexpr = tl.constexpr(-8e3)  # below this a teacher's logit is -inf, or as good as that
_LOWEST: tl.constexpr = tl.constexpr(-1e38)  # a running maximum before it has seen anything, even what is masked


@triton.jit
def _running(maximum, total, new):
    """Running maximum and sum of exponentials, with what the sum so far was multiplied by."""
    higher = tl.maximum(maximum, new)
    scale = tl.exp(maximum - higher)
    share = tl.exp(new - higher)
    return higher, total * scale + share, scale, share


@triton.jit
def compare_rows(
    student,  # [n, V] logits
    teacher,  # [n, V] logits
    labels,  # int64 [n], negative where there is none
    weights,  # fp32 [n, 4]: of F, R, C and of gamma R + (1 - gamma) F
    gamma,  # fp32 [n]; written where GAMMA_OF_LABEL
    values,  # fp32 [n, 3]: F, R, C
    grad,  # [n, V]
    V,
    inverse_tau,
    TEACHER: tl.constexpr,
    GAMMA_OF_LABEL: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    student += row * V
    teacher += row * V
    grad += row * V
    s_max = tl.full([BLOCK], _LOWEST, tl.float32)
    t_max = tl.full([BLOCK], _LOWEST, tl.float32)
    s_sum = tl.zeros([BLOCK], tl.float32)
    t_sum = tl.zeros([BLOCK], tl.float32)
    apart = tl.zeros([BLOCK], tl.float32)
    barred = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, V, BLOCK):
        inside = begin + lanes < V
        z = tl.load(student + begin + lanes, mask=inside, other=float("-inf")).to(tl.float32) * inverse_tau
        s_max, s_sum, scale, share = _running(s_max, s_sum, z)
        if TEACHER:
            y = tl.load(teacher + begin + lanes, mask=inside, other=float("-inf")).to(tl.float32) * inverse_tau
            t_max, t_sum, _, _ = _running(t_max, t_sum, y)
            allowed = y > _BARRED
            distance = tl.where(inside, z, 0.0) - tl.where(allowed, y, LOG_FLOOR)
            apart = apart * scale + tl.where(inside, share * distance, 0.0)
            barred = barred * scale + tl.where(allowed, 0.0, share)
    top = tl.max(s_max, 0)
    held = tl.exp(s_max - top)
    total = tl.sum(s_sum * held, 0)
    s_lse = top + tl.log(total)
    label = tl.load(labels + row)
    f = tl.load(weights + row * 4)
    r = tl.load(weights + row * 4 + 1)
    c = tl.load(weights + row * 4 + 2)
    t_lse = 0.0
    reverse = 0.0
    if TEACHER:
        t_top = tl.max(t_max, 0)
        t_lse = t_top + tl.log(tl.sum(t_sum * tl.exp(t_max - t_top), 0))
        reverse = (tl.sum(apart * held, 0) - t_lse * tl.sum(barred * held, 0)) / total - s_lse + t_lse
        confidence = tl.load(gamma + row)
        if GAMMA_OF_LABEL:
            said = tl.load(teacher + label, mask=label >= 0, other=float("-inf")).to(tl.float32) * inverse_tau
            confidence = tl.exp(said - t_lse)
            tl.store(gamma + row, confidence)
        mixed = tl.load(weights + row * 4 + 3)
        f += mixed * (1.0 - confidence)
        r += mixed * confidence
    F = tl.zeros([BLOCK], tl.float32)
    R = tl.zeros([BLOCK], tl.float32)
    C = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, V, BLOCK):
        inside = begin + lanes < V
        s = tl.load(student + begin + lanes, mask=inside, other=_LOWEST).to(tl.float32) * inverse_tau - s_lse
        q = tl.exp(s)
        target = begin + lanes == label
        C -= tl.where(target, s, 0.0)
        slope = c * tl.where(target, q - 1.0, q)
        if TEACHER:
            y = tl.load(teacher + begin + lanes, mask=inside, other=float("-inf")).to(tl.float32) * inverse_tau
            t = tl.where(y > _BARRED, y - t_lse, LOG_FLOOR)
            p = tl.exp(t)
            F += tl.where(inside, p * (t - s), 0.0)
            R += tl.where(inside, q * (s - t), 0.0)
            slope += f * (q - p) + r * q * (s - t - reverse)
        slope *= inverse_tau
        if ACCUMULATE:
            slope += tl.load(grad + begin + lanes, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad + begin + lanes, slope.to(grad.dtype.element_ty), mask=inside)
    tl.store(values + row * 3, tl.sum(F, 0))
    tl.store(values + row * 3 + 1, tl.sum(R, 0))
    tl.store(values + row * 3 + 2, tl.sum(C, 0))
