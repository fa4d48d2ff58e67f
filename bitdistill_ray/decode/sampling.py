"""From logits to tokens: what is allowed, biases, penalties, temperature, top-k, top-p, min-p, a seed for each request.

A pure function of logits and history.  The order is the one of transformers and vLLM: the tokens that a grammar allows,
biases, penalties, temperature, top-k, top-p (of what top-k left), min-p.  A row's draw is by inversion: with u uniform
in [0, 1) and P the cumulative sum of the kept probabilities in the order of the vocabulary, the token is the first
whose P exceeds u * P_total.

The uniform number is a hash of (seed, index of the token), not the state of a generator (Salmon et al., "Parallel
random numbers: as easy as 1, 2, 3", 2011).  So a sequence's text depends on its own seed and logits, never on what
shares its batch, and a request resumed after token n goes on as if it had never stopped.  For the same reason what is
kept is decided by value: tokens that tie with the last kept one are kept too.

    B rows   V vocabulary   n rows of a group
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bitdistill_ray.errors import ConfigError

PREFIX = 1024  # how many of the likeliest tokens are sorted before the whole vocabulary is


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How one request's tokens are chosen, and how many at most.  Raises ConfigError for values out of range.

    temperature         0 is greedy
    top_k               keep the k likeliest tokens; 0 keeps all
    top_p               keep the smallest set of likeliest tokens whose probability reaches top_p
    min_p               keep tokens at least min_p times as likely as the likeliest
    repetition_penalty  divides positive logits of tokens in the prompt or the text, multiplies negative ones
    presence_penalty    subtracted from the logits of tokens in the text (not the prompt)
    frequency_penalty   subtracted once for each time a token occurs in the text
    logit_bias          (token, number added to its logit) pairs
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        legal = {
            "max_tokens": (self.max_tokens >= 1, "at least 1"),
            "temperature": (0 <= self.temperature < float("inf"), "0 or more"),
            "top_k": (self.top_k >= 0, "0 or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "between 0 and 1"),
            "repetition_penalty": (0.01 <= self.repetition_penalty <= 100, "between 0.01 and 100"),  # fp32 holds logits
            "presence_penalty": (abs(self.presence_penalty) <= 100, "between -100 and 100"),
            "frequency_penalty": (abs(self.frequency_penalty) <= 100, "between -100 and 100"),
            "logit_bias": (
                all(t >= 0 and abs(b) <= 100 for t, b in self.logit_bias),
                "between -100 and 100 for tokens",
            ),
        }
        for name, (is_legal, wanted) in legal.items():
            if not is_legal:
                raise ConfigError(f"sampling.{name}", f"{getattr(self, name)}", f"Give a value {wanted}")

    @property
    def penalises(self) -> bool:
        """True where the choice depends on the tokens so far."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)

    @property
    def plain(self) -> bool:
        """True where the likeliest token is the next, whatever came before."""
        return self.temperature == 0 and not self.penalises and not self.logit_bias

    @property
    def truncates(self) -> bool:
        """True where top-k or top-p drops tokens (min-p needs no order, so it is not meant)."""
        return self.top_k > 0 or self.top_p < 1


@dataclass(frozen=True, slots=True)
class History:
    """One row's request and its tokens so far; `allowed_V` is true for the tokens that may come next (None: all)."""

    sampling: Sampling
    prompt: Sequence[int]
    generated: Sequence[int]
    allowed_V: Tensor | None = None


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) with 40 random bits, the hash of (seed, index): two rounds of splitmix64's mixer."""
    return (_mix(_mix(seed) + index) >> 24) / 2**40


def _mix(x: int) -> int:
    """One output of splitmix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014)."""
    mask = 2**64 - 1
    x = (x + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def likeliest(logits_BV: Tensor) -> tuple[list[int], list[float]]:
    """The token with the highest logit of each row, the first of equals, and that logit; a row with a NaN gives it.

    On a CPU by numpy, whose search is vectorised: torch's takes ten times as long.
    """
    if logits_BV.device.type == "cpu":
        rows_BV = logits_BV.numpy()
        tokens_B = rows_BV.argmax(axis=-1)
        return tokens_B.tolist(), [float(row[token]) for row, token in zip(rows_BV, tokens_B, strict=True)]
    best = logits_BV.max(dim=-1)
    return best.indices.tolist(), best.values.tolist()


def sample(logits_BV: Tensor, rows: Sequence[History]) -> list[int]:
    """Choose the next token of every row from fp32 logits; `logits_BV` is left as it was."""
    if any(row.allowed_V is not None or row.sampling.logit_bias for row in rows):
        logits_BV = steered(logits_BV, rows)
    if any(row.sampling.penalises for row in rows):
        logits_BV = penalised(logits_BV, rows)
    tokens = likeliest(logits_BV)[0]
    drawn = [i for i, row in enumerate(rows) if row.sampling.temperature > 0]
    if drawn:
        chosen = [rows[i] for i in drawn]
        probs_nV = kept_probabilities(logits_BV[drawn], [row.sampling for row in chosen])
        # fp64: at 150 000 tokens an fp32 sum loses the tail; and 40 random bits never round u * total up to total
        cumulative_nV = probs_nV.double().cumsum(dim=-1)
        draws = [uniform(row.sampling.seed, len(row.generated)) for row in chosen]
        target_n1 = _column(draws, cumulative_nV) * cumulative_nV[:, -1:]
        drawn_n1 = torch.searchsorted(cumulative_nV, target_n1, right=True).clamp_(max=logits_BV.shape[-1] - 1)
        for i, token in zip(drawn, drawn_n1[:, 0].tolist(), strict=True):
            tokens[i] = token
    return tokens


def steered(logits_BV: Tensor, rows: Sequence[History]) -> Tensor:
    """Logits with each row's biases added, and -inf where a token is not allowed; a new tensor."""
    logits_BV = logits_BV.clone()
    for logits_V, row in zip(logits_BV, rows, strict=True):
        if row.sampling.logit_bias:
            tokens, biases = zip(*row.sampling.logit_bias, strict=True)
            logits_V[list(tokens)] += torch.tensor(biases, dtype=logits_V.dtype, device=logits_V.device)
        if row.allowed_V is not None:
            logits_V.masked_fill_(~row.allowed_V.to(logits_V.device), -torch.inf)
    return logits_BV


def penalised(logits_BV: Tensor, rows: Sequence[History]) -> Tensor:
    """Logits after repetition (Keskar et al., "CTRL", 2019), presence and frequency penalties; a new tensor."""
    count_BV, seen_BV = torch.zeros_like(logits_BV), torch.zeros_like(logits_BV, dtype=torch.bool)
    for i, row in enumerate(rows):
        if row.sampling.penalises:
            text = torch.tensor(row.generated, dtype=torch.int64, device=logits_BV.device)
            count_BV[i] = torch.bincount(text, minlength=logits_BV.shape[1])
            seen_BV[i, text] = True
            seen_BV[i, torch.tensor(row.prompt, dtype=torch.int64, device=logits_BV.device)] = True
    repetition_B1 = _column([row.sampling.repetition_penalty for row in rows], logits_BV)
    presence_B1 = _column([row.sampling.presence_penalty for row in rows], logits_BV)
    frequency_B1 = _column([row.sampling.frequency_penalty for row in rows], logits_BV)
    repeated_BV = torch.where(logits_BV > 0, logits_BV / repetition_B1, logits_BV * repetition_B1)
    return torch.where(seen_BV, repeated_BV, logits_BV) - frequency_B1 * count_BV - presence_B1 * (count_BV > 0)


def kept_probabilities(logits_nV: Tensor, rows: Sequence[Sampling]) -> Tensor:
    """softmax(logits / temperature) with what top-k, top-p and min-p drop set to 0 (not renormalised)."""
    shifted_nV = logits_nV - logits_nV.max(dim=-1, keepdim=True).values  # before the division: no overflow at any T
    probs_nV = torch.softmax(shifted_nV / _column([row.temperature for row in rows], logits_nV), dim=-1)
    least_n1 = probs_nV.max(dim=-1, keepdim=True).values * _column([row.min_p for row in rows], logits_nV)
    cut = [i for i, row in enumerate(rows) if row.truncates]
    if cut:
        least_n1[cut] = torch.maximum(least_n1[cut], _nucleus_floor(probs_nV[cut], [rows[i] for i in cut]))
    return torch.where(probs_nV >= least_n1, probs_nV, 0)


def _nucleus_floor(probs_nV: Tensor, rows: Sequence[Sampling]) -> Tensor:
    """The least probability that top-k and then top-p keep, [n, 1].

    A row is decided by its PREFIX likeliest tokens where they hold its nucleus, else by all of them: sorting a whole
    vocabulary costs more than a small model's step.
    """
    V = probs_nV.shape[1]
    k_n = torch.tensor([min(row.top_k or V, V) for row in rows], device=probs_nV.device)
    top_p_n = torch.tensor([row.top_p for row in rows], dtype=torch.float64, device=probs_nV.device)
    width = min(V, max([PREFIX, *(row.top_k for row in rows)]))
    floor_n1, last_n = _floor(probs_nV.topk(width, dim=-1).values, k_n, top_p_n)
    undecided_n = (k_n > width) & (last_n == width - 1)
    if bool(undecided_n.any()):
        everything = probs_nV[undecided_n].sort(dim=-1, descending=True).values
        floor_n1[undecided_n] = _floor(everything, k_n[undecided_n], top_p_n[undecided_n])[0]
    return floor_n1


def _floor(sorted_nW: Tensor, k_n: Tensor, top_p_n: Tensor) -> tuple[Tensor, Tensor]:
    """The least kept of each row's W likeliest tokens, [n, 1], and its rank [n].  k_n > W means all tokens."""
    rank_W = torch.arange(sorted_nW.shape[1], device=sorted_nW.device)
    in_k_nW = rank_W < k_n[:, None]
    cumulative_nW = torch.where(in_k_nW, sorted_nW, 0).double().cumsum(dim=-1)
    # the mass that top-k left: 1 where it left the whole vocabulary
    mass_n = torch.where(k_n > sorted_nW.shape[1], 1.0, cumulative_nW[:, -1])
    # a token stays while those before it have not reached top_p, so the likeliest always stays
    before_nW = cumulative_nW - torch.where(in_k_nW, sorted_nW, 0)
    stays_nW = in_k_nW & ((before_nW < (top_p_n * mass_n)[:, None]) | (rank_W == 0))
    last_n = stays_nW.sum(dim=-1) - 1
    return sorted_nW.gather(1, last_n[:, None]), last_n


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]
