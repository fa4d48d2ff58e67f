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
    means: list[list[float]] = []
    for batch in _batches(ids_WT):
        student_BTD, teacher_BTD = _hidden(student, batch), None if alone else _hidden(teacher, batch)
        rows = [
            _sums(student, teacher, student_TD[:-1], None if teacher_BTD is None else teacher_BTD[row, :-1], ids_T[1:])
            for row, (student_TD, ids_T) in enumerate(zip(student_BTD, batch.ids_BT, strict=True))
        ]
        means += (torch.stack(rows) / (ids_WT.shape[1] - 1)).tolist()
    nll, kl, same = np.array(means).T
    windows, context = ids_WT.shape
    protocol = f"{windows} windows of {context} tokens, no start token"
    metrics = {f"ppl:{name}": bootstrap(nll, protocol, np.exp)}
    if not alone:
        metrics[f"kl:{name}"] = bootstrap(kl, f"KL(teacher || student) per token, nats; {protocol}")
        metrics[f"agreement:{name}"] = bootstrap(same, f"top-1 agreement with the teacher; {protocol}")
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
def _sums(
    student: nn.Module, teacher: nn.Module, student_TD: Tensor, teacher_TD: Tensor | None, labels_T: Tensor
) -> Tensor:
    """float64 [3] on the student's device: negative log-likelihood, KL and agreement, summed over a window's tokens."""
    sums = torch.zeros(3, dtype=torch.float64, device=student_TD.device)
    for first in range(0, len(labels_T), CHUNK):
        piece = slice(first, first + CHUNK)
        log_s_TV = LMHead(student)(student_TD[piece]).float().log_softmax(-1)
        labels = labels_T[piece].to(log_s_TV.device)
        found = [F.nll_loss(log_s_TV, labels, reduction="sum"), sums.new_zeros(()), sums.new_zeros(())]
        if teacher_TD is not None:
            log_t_TV = LMHead(teacher)(teacher_TD[piece]).float().log_softmax(-1).to(log_s_TV.device)
            found[1:] = [kl_divergence(log_t_TV, log_s_TV).sum(), (log_t_TV.argmax(-1) == log_s_TV.argmax(-1)).sum()]
        sums += torch.stack([value.double() for value in found])
    return sums
