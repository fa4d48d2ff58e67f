"""What a packed embedding and head cost a student: its own perplexity before and after, KL and agreement between both.

Only the tables change: the student is read once, measured as it was trained, then measured again with the very values
that its packed tables stand for.  On the shipped excerpt, so that it can be done wherever a student is packed.

    W windows   T tokens   D hidden size
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bitdistill_ray.evaluation import language
from bitdistill_ray.evaluation.suite import excerpt
from bitdistill_ray.hardware import local_device
from bitdistill_ray.losses.quality import quality_sums
from bitdistill_ray.losses.teacher_view import Head
from bitdistill_ray.model.heads import LMHead
from bitdistill_ray.model.student import load_student, saved_dtype
from bitdistill_ray.packed.folder import PackedFolder
from bitdistill_ray.packed.summary import is_table, summarise
from bitdistill_ray.packed.weight import unpack
from bitdistill_ray.quant import dequantize

CONTEXT, TOKENS = 256, 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadCost:
    """KL is from the student with 16-bit tables to that with packed ones, in nats a token."""

    perplexity_16: float
    perplexity: float
    kl: float
    agreement: float
    bytes_16: int
    bytes: int

    def __str__(self) -> str:
        return (
            f"embedding and head {self.bytes / 1e6:.1f} MB, {self.bytes_16 / 1e6:.1f} in 16 bits; on the excerpt "
            f"perplexity {self.perplexity:.2f}, {self.perplexity_16:.2f} with 16 bits (KL {self.kl:.4f}, "
            f"agreement {self.agreement:.3f})"
        )


@torch.no_grad()
def head_cost(student: Path, packed: Path) -> HeadCost | None:
    """Of the packed form of the student folder `student`; None where its tables are not packed.

    Raises ModelError or PackedError for a folder that cannot be read.
    """
    folder = PackedFolder.open(packed)
    tables = [name for name in folder.manifest.packed if is_table(name)]
    if not tables:
        return None
    model, tokenizer = load_student(student, dtype=saved_dtype(student), device=local_device())
    ids_WT = language.windows(excerpt(), tokenizer, context=CONTEXT, max_tokens=TOKENS)
    head, head_16, hidden_16_WTD = LMHead(model), LMHead(model).frozen_copy(), language.hidden(model, ids_WT)
    nll_16, *_ = _means(head_16, hidden_16_WTD, ids_WT, head_16, hidden_16_WTD)
    for name in tables:
        model.get_submodule(name).weight.copy_(dequantize(unpack(folder.weight(name))))
    nll, kl, agreement = _means(head, language.hidden(model, ids_WT), ids_WT, head_16, hidden_16_WTD)
    summary = summarise(folder)
    return HeadCost(
        perplexity_16=math.exp(nll_16),
        perplexity=math.exp(nll),
        kl=kl,
        agreement=agreement,
        bytes_16=2 * sum(math.prod(folder.manifest.packed[name].shape) for name in tables),
        bytes=summary.bytes - summary.bytes_without_embeddings,
    )


def _means(head: Head, hidden_WTD: Tensor, ids_WT: Tensor, head_16: Head, hidden_16_WTD: Tensor) -> list[float]:
    """Negative log-likelihood, KL and agreement of `head` beside `head_16`, per token."""
    rows = [
        quality_sums(head, hidden_TD[:-1], ids_T[1:], head_16, hidden_16_TD[:-1])
        for hidden_TD, ids_T, hidden_16_TD in zip(hidden_WTD, ids_WT, hidden_16_WTD, strict=True)
    ]
    means: list[float] = (torch.stack(rows).mean(dim=0) / (ids_WT.shape[1] - 1)).tolist()
    return means
