"""Tokens drawn from the teacher's distribution: what the `sampled` payload carries.

    KL(T || S) = E_{x ~ T} [log T(x) - log S(x)]        so the mean over tokens drawn from T is unbiased, as is its
                                                        gradient, at any number of draws (RS-KD, Anshumann et al. 2025)

The draws are stratified: the i-th of S falls into the i-th of S equal parts of the cumulative distribution.  Each token
is still drawn with its own probability on average, and the spread is smaller than that of S independent draws.

The random numbers belong to the question: a counter-based generator keyed by the digest of the sequence's ids and
document boundaries gives every position its own.  Any teacher, asked any number of times, in whatever batch, draws with
the same ones.    n tokens   V vocabulary   S draws of a token
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from bitdistill_ray.core import Sampled, TokenBatch
from bitdistill_ray.losses.teacher_view import Head

CHUNK = 64  # positions whose cumulative distributions, in float64, are held at a time


def uniforms(ids_T: np.ndarray, segment_T: np.ndarray, draws: int) -> np.ndarray:
    """float64 [T, S] in [0, 1), rising along S: one number of every stratum, decided by the sequence alone."""
    digest = hashlib.sha256(ids_T.astype("<i4").tobytes() + segment_T.astype("<i4").tobytes()).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
    within_TS = generator.random((len(ids_T), draws))
    return np.asarray((np.arange(draws) + within_TS) / draws)


def draw(log_nV: Tensor, uniform_nS: Tensor) -> Tensor:
    """int32 ids [n, S] where the cumulative distributions of `log_nV` (log-probabilities) pass `uniform_nS`."""
    cumulative_nV = log_nV.double().exp().cumsum(-1)
    cumulative_nV /= cumulative_nV[:, -1:].clone()
    found_nS = torch.searchsorted(cumulative_nV, uniform_nS.double(), right=True)
    return found_nS.clamp_max(log_nV.shape[-1] - 1).int()


def sampled(hidden_BTD: Tensor, head: Head, batch: TokenBatch, draws: int) -> Sampled:
    """`draws` tokens for every position, and the teacher's log-probabilities of them in fp16."""
    ids_BTS, logprobs_BTS = [], []
    for hidden_TD, ids_T, segment_T in zip(hidden_BTD, batch.ids_BT, batch.segment_BT, strict=True):
        uniform_TS = torch.from_numpy(uniforms(ids_T.cpu().numpy(), segment_T.cpu().numpy(), draws))
        ids, logprobs = [], []
        uniform_chunks = torch.split(uniform_TS.to(hidden_BTD.device), CHUNK)
        for h_nD, uniform_nS in zip(torch.split(hidden_TD, CHUNK), uniform_chunks, strict=True):
            log_nV = head(h_nD).float().log_softmax(-1)
            ids.append(draw(log_nV, uniform_nS))
            logprobs.append(log_nV.gather(-1, ids[-1].long()).half())
        ids_BTS.append(torch.cat(ids))
        logprobs_BTS.append(torch.cat(logprobs))
    return Sampled(ids_BTS=torch.stack(ids_BTS), logprobs_BTS=torch.stack(logprobs_BTS))
