"""Perplexity, KL(teacher || student) and top-1 agreement on a text, in one pass.

The text is cut into windows of `context` tokens without a start token; each window is scored alone, all its tokens but
the first are predicted, and what does not fill a window is left out (a text shorter than one window is one short
window).  Perplexity alone can be gamed by training on the text's domain, KL and agreement cannot: report all three.

    W windows   T context   V vocabulary
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitdistill_ray.core import TokenBatch
from bitdistill_ray.errors import DataError
from bitdistill_ray.evaluation.metric import Metric, bootstrap
from bitdistill_ray.losses.divergence import kl_divergence
from bitdistill_ray.model.forward import hidden_states
from bitdistill_ray.model.heads import LMHead

CHUNK = 1024  # tokens whose logits exist at a time
WINDOWS_AT_A_TIME = 8


def windows(text: str, tokenizer: Any, *, context: int, max_tokens: int | None = None) -> Tensor:
    """Token windows ids_WT of a text.

    Raises:
        DataError: the text has fewer than two tokens.
    """
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    ids = ids[:max_tokens] if max_tokens else ids
    if len(ids) < 2:
        raise DataError("evaluation text", f"{len(ids)} tokens", "Give a text of at least two tokens")
    width = min(context, len(ids))
    return torch.tensor(ids[: len(ids) // width * width]).view(-1, width)


def measure(
    student: nn.Module, teacher: nn.Module, ids_WT: Tensor, *, name: str, alone: bool = False
) -> dict[str, Metric]:
    """`ppl:NAME`, and unless `alone` also `kl:NAME` and `agreement:NAME`, of `student` beside `teacher`.

    Both are causal LMs of a supported family with one vocabulary; each runs on its own device and dtype, logits are
    compared in fp32.
    """
    nll, kl, same = [], [], []
    for batch in _batches(ids_WT):
        labels_BT = batch.ids_BT[:, 1:]
        student_BTD, teacher_BTD = _hidden(student, batch), None if alone else _hidden(teacher, batch)
        for row, labels_T in enumerate(labels_BT):
            log_s_TV = _log_probabilities(student, student_BTD[row, :-1])
            nll.append(F.nll_loss(log_s_TV, labels_T).item())
            if teacher_BTD is not None:
                log_t_TV = _log_probabilities(teacher, teacher_BTD[row, :-1])
                kl.append(kl_divergence(log_t_TV, log_s_TV).mean().item())
                same.append((log_t_TV.argmax(-1) == log_s_TV.argmax(-1)).float().mean().item())
    windows, context = ids_WT.shape
    protocol = f"{windows} windows of {context} tokens, no start token"
    metrics = {f"ppl:{name}": bootstrap(np.array(nll), protocol, np.exp)}
    if not alone:
        metrics[f"kl:{name}"] = bootstrap(np.array(kl), f"KL(teacher || student) per token, nats; {protocol}")
        metrics[f"agreement:{name}"] = bootstrap(np.array(same), f"top-1 agreement with the teacher; {protocol}")
    return metrics


def _batches(ids_WT: Tensor) -> Iterator[TokenBatch]:
    for first in range(0, len(ids_WT), WINDOWS_AT_A_TIME):
        ids_BT = ids_WT[first : first + WINDOWS_AT_A_TIME]
        yield TokenBatch(
            ids_BT=ids_BT,
            target_BT=torch.ones_like(ids_BT, dtype=torch.bool),
            segment_BT=torch.zeros_like(ids_BT, dtype=torch.int32),
            sequence_ids=tuple(f"window#0#{first + i}" for i in range(len(ids_BT))),
        )


@torch.no_grad()
def _hidden(model: nn.Module, batch: TokenBatch) -> Tensor:
    return hidden_states(model, batch.to(next(model.parameters()).device))


@torch.no_grad()
def _log_probabilities(model: nn.Module, hidden_TD: Tensor) -> Tensor:
    """fp32 log-probabilities [T, V] on the CPU."""
    head = LMHead(model)
    chunks = (hidden_TD[first : first + CHUNK] for first in range(0, len(hidden_TD), CHUNK))
    return torch.cat([head(h).float().log_softmax(-1).cpu() for h in chunks])
