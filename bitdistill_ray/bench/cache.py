"""What a cached top-k answer costs in bytes and in accuracy, and how fast it is coded.

The distributions are synthetic, since what a record can do to the loss depends on their shape: a few likely tokens, and
a long, noisy tail by Zipf's law with another exponent at every position, over Qwen3's vocabulary.  The student is the
teacher with noise on its logits.    n tokens   S entries
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from bitdistill_ray.bench.report import Row, Unit
from bitdistill_ray.cache.topk import TopKCoder
from bitdistill_ray.core import Coding
from bitdistill_ray.losses.divergence import kl_divergence, log_probabilities
from bitdistill_ray.losses.teacher_view import TopKView

VOCABULARY, TOKENS, ENTRIES = 151_936, 64, (50, 128)
TIMED_TOKENS, ROUNDS = 4096, 3
STUDENT_NOISE = 1.0  # standard deviation, in logits
PROMISED_ERROR = 0.5  # per cent of the loss


def measure() -> list[Row]:
    """Rows of every coding at every number of entries; one thread of numpy."""
    teacher_nV = heavy_tailed(TOKENS, VOCABULARY)
    student_nV = teacher_nV + STUDENT_NOISE * torch.randn(
        TOKENS, VOCABULARY, generator=torch.Generator().manual_seed(1)
    )
    student_log_nV = log_probabilities(student_nV)
    rows: list[Row] = []
    for entries in ENTRIES:
        top = log_probabilities(teacher_nV).topk(entries, dim=-1)
        ids_nS, logprobs_nS = top.indices.int().numpy(), top.values.numpy()
        exact = _loss(student_log_nV, ids_nS, logprobs_nS)
        for coding in (Coding.LOSSLESS, Coding.COMPACT):
            coder = TopKCoder(coding=coding, vocabulary=VOCABULARY, entries=entries)
            records = coder.encode(ids_nS, logprobs_nS.astype(np.float16))
            found = _loss(student_log_nV, *coder.decode(records))
            rows += _rows(coder, ids_nS, logprobs_nS, error=100 * abs(found - exact) / exact)
    return rows


def _rows(coder: TopKCoder, ids_nS: np.ndarray, logprobs_nS: np.ndarray, *, error: float) -> list[Row]:
    case = f"cache, topk {coder.entries} {coder.coding}"
    repeats = TIMED_TOKENS // len(ids_nS)
    ids, values = np.tile(ids_nS, (repeats, 1)), np.tile(logprobs_nS.astype(np.float16), (repeats, 1))
    records = coder.encode(ids, values)
    return [
        Row(case=case, metric="bytes per token", unit=Unit.BYTES, value=records.nbytes / len(records),
            baseline=6.0 * coder.entries, baseline_is="int32 ids and fp16 values, as on the wire"),
        Row(case=case, metric="error of the forward KL", unit=Unit.PERCENT, value=error, limit=PROMISED_ERROR,
            limit_is="what the cache promises at k = 128"),
        Row(case=case, metric="encode", unit=Unit.TOKENS_S, threads=1,
            value=len(ids) / _seconds(lambda: coder.encode(ids, values))),
        Row(case=case, metric="decode", unit=Unit.TOKENS_S, threads=1,
            value=len(ids) / _seconds(lambda: coder.decode(records))),
    ]  # fmt: skip


def heavy_tailed(tokens: int, vocabulary: int, *, seed: int = 0) -> Tensor:
    """fp32 logits [n, V]: Zipf's law with another exponent, noise and likely tokens at every position."""
    rng = np.random.default_rng(seed)
    ranks = np.arange(1, vocabulary + 1)
    rows = []
    for _ in range(tokens):
        logits_V = -rng.uniform(0.8, 2.5) * np.log(ranks + rng.uniform(0, 20)) + rng.normal(0, 0.7, vocabulary)
        logits_V[:3] += rng.exponential(2.5, 3)
        rows.append(rng.permutation(logits_V))
    return torch.from_numpy(np.stack(rows)).float()


def _loss(student_log_nV: Tensor, ids_nS: np.ndarray, logprobs_nS: np.ndarray) -> float:
    view = TopKView(torch.from_numpy(ids_nS), torch.from_numpy(logprobs_nS))
    student_nP, teacher_nP = view.compare(student_log_nV, temperature=1.0)
    return float(kl_divergence(teacher_nP, student_nP).mean())


def _seconds(function: Callable[[], object]) -> float:
    times = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return min(times)
