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
from torch import Tensor, nn

from bitdistill_ray.core import TokenBatch
from bitdistill_ray.errors import DataError
from bitdistill_ray.evaluation.metric import Metric, bootstrap
from bitdistill_ray.losses.quality import quality_sums
from bitdistill_ray.model.forward import hidden_states
from bitdistill_ray.model.heads import LMHead

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
            quality_sums(LMHead(student), student_TD[:-1], ids_T[1:], LMHead(teacher),
                         None if teacher_BTD is None else teacher_BTD[row, :-1])
            for row, (student_TD, ids_T) in enumerate(zip(student_BTD, batch.ids_BT, strict=True))
        ]  # fmt: skip
        means += (torch.stack(rows) / (ids_WT.shape[1] - 1)).tolist()
    nll, kl, same = np.array(means).T
    windows, context = ids_WT.shape
    protocol = f"{windows} windows of {context} tokens, no start token"
    metrics = {f"ppl:{name}": bootstrap(nll, protocol, np.exp)}
    if not alone:
        metrics[f"kl:{name}"] = bootstrap(kl, f"KL(teacher || student) per token, nats; {protocol}")
        metrics[f"agreement:{name}"] = bootstrap(same, f"top-1 agreement with the teacher; {protocol}")
    return metrics


def hidden(model: nn.Module, ids_WT: Tensor) -> Tensor:
    """What the head of `model` reads, [W, T, D], on its device and in its dtype."""
    return torch.cat([_hidden(model, batch) for batch in _batches(ids_WT)])


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
