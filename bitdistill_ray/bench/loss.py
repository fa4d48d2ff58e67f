"""The loss alone, forward and backward pass: in chunks as a run makes it, beside the plain formula on all tokens."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bitdistill_ray.bench.memory import peak_bytes
from bitdistill_ray.bench.report import Row, Unit
from bitdistill_ray.bench.timing import seconds_per_call
from bitdistill_ray.bench.train import Load
from bitdistill_ray.core import TeacherSignals
from bitdistill_ray.losses.chunked import chunked_loss
from bitdistill_ray.losses.divergence import forward_kl
from bitdistill_ray.losses.objective import Objective, Term, TermKind


def measure(load: Load, device: torch.device, threads: int | None) -> list[Row]:
    """Peak memory and time; on a GPU in bf16."""
    placed: dict[str, Any] = {"device": device, "dtype": torch.bfloat16 if device.type == "cuda" else torch.float32}
    heads = [nn.Linear(load.loss_hidden, load.loss_vocabulary, bias=False, **placed) for _ in range(2)]
    heads[1].requires_grad_(requires_grad=False)
    shape = (4, load.loss_tokens // 4, load.loss_hidden)
    student_BTD, teacher_BTD = (torch.randn(shape, **placed) for _ in range(2))
    labels_BT = torch.randint(load.loss_vocabulary, shape[:2], device=device)
    signals = TeacherSignals(sequence_ids=("random",) * shape[0], hidden_BTD=teacher_BTD)
    objective = Objective(terms=(Term(kind=TermKind.FORWARD_KL),))

    def chunks(hidden_BTD: Tensor) -> Tensor:
        return chunked_loss(hidden_BTD, heads[0], signals, heads[1], labels_BT, objective,
                            chunk_tokens=load.loss_chunk).value  # fmt: skip

    def plain(hidden_BTD: Tensor) -> Tensor:
        return forward_kl(heads[0](hidden_BTD.flatten(0, 1)), heads[1](teacher_BTD.flatten(0, 1))).mean()

    def both_passes(loss: Any) -> None:
        hidden_BTD = student_BTD.clone().requires_grad_()
        heads[0].zero_grad()
        loss(hidden_BTD).backward()

    chunked, whole = partial(both_passes, chunks), partial(both_passes, plain)
    times = seconds_per_call({"chunked": chunked, "whole": whole}, device=device, windows=5)
    shared: dict[str, Any] = {
        "case": f"loss of {load.loss_tokens} tokens in chunks of {load.loss_chunk}",
        "threads": threads,
        "baseline_is": f"the plain formula on all {load.loss_tokens} tokens, vocabulary {load.loss_vocabulary}",
    }
    return [
        Row(**shared, metric="peak memory", unit=Unit.MIB, value=peak_bytes(chunked, device) / 2**20,
            baseline=peak_bytes(whole, device) / 2**20),
        Row(**shared, metric="time", unit=Unit.MILLISECONDS, value=times["chunked"] * 1e3,
            baseline=times["whole"] * 1e3),
    ]  # fmt: skip
