"""How likely the model held a token, and the tokens that it held likelier: what OpenAI's `logprobs` tells.

Of the model's own logits, before biases, penalties, temperature and grammars: so the numbers say what the model
thinks, and those of a prompt and of a text that it wrote compare.

    T positions   V vocabulary   S alternatives
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token in its place, and the likeliest ones there, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()

    def cut(self, top: int) -> TokenLogprob:
        """The same with fewer alternatives."""
        return TokenLogprob(self.token, self.logprob, self.top[:top])


def token_logprobs(logits_TV: Tensor, tokens: Sequence[int], top: int = 0) -> list[TokenLogprob]:
    """The log-probability of each of `tokens` under its row of fp32 logits, beside the `top` likeliest."""
    tokens_T1 = torch.tensor(tokens, dtype=torch.int64, device=logits_TV.device)[:, None]
    total_T1 = logits_TV.logsumexp(dim=-1, keepdim=True)
    own_T = (logits_TV.gather(1, tokens_T1) - total_T1)[:, 0].tolist()
    best_TS = logits_TV.topk(min(top, logits_TV.shape[1]), dim=-1)
    best = zip((best_TS.values - total_T1).tolist(), best_TS.indices.tolist(), strict=True)
    return [
        TokenLogprob(token, logprob, tuple(zip(ids, values, strict=True)))
        for token, logprob, (values, ids) in zip(tokens, own_T, best, strict=True)
    ]
