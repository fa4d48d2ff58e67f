"""Two long parameters train as the model's own do, and the model's own stay views of them."""

from __future__ import annotations

import copy
import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from bitdistill_ray.config import StudentConfig
from bitdistill_ray.core import Format, QuantSpec, TeacherSignals, TokenBatch
from bitdistill_ray.loss_config import LossConfig
from bitdistill_ray.losses.reduction import Totals
from bitdistill_ray.model.forward import hidden_states
from bitdistill_ray.model.heads import LMHead
from bitdistill_ray.model.surgery import quantize_linears
from bitdistill_ray.stage_config import DistillStage
from bitdistill_ray.student.engine import start_engine
from bitdistill_ray.student.layout import MOST_WEIGHTS, LongParameters, OwnParameters, can_lay_out
from bitdistill_ray.student.module import LossModule
from bitdistill_ray.student.objective import objective_of
from bitdistill_ray.student.recording import Recording
from tests.tiny_models import EVERY_CASE, packed_batch, tiny_model

CPU = torch.device("cpu")
BATCHES = [packed_batch(rows, 16, seed=seed) for seed, rows in enumerate(([[9, 5], [12]], [[16], [3, 3]], [[1], [15]]))]


Trained = tuple[list[Tensor], dict[str, Tensor], dict[str, Tensor]]
RANKS = 2
RUNS = [*((case, Format.INT3, 1) for case in EVERY_CASE), ("llama", Format.INT3, 2), ("llama", Format.SEQ2, 1)]


def student_of(case: str, *, format: Format = Format.INT3) -> LossModule:
    model = tiny_model(case, seed=1)
    quantize_linears(model, QuantSpec(format=format, group_size=16))
    head = LMHead(tiny_model(case)).frozen_copy()
    return LossModule(model.train(), objective_of(LossConfig(forward_kl=1.0)), chunk_tokens=7, teacher_head=head)


@torch.no_grad()
def said(case: str, batch: TokenBatch) -> TeacherSignals:
    return TeacherSignals(sequence_ids=batch.sequence_ids, hidden_BTD=hidden_states(tiny_model(case), batch))


def train(rank: int, case: str, format: Format, *, zero: int, long: bool) -> Trained:
    """(losses of three steps, the parameters before and after), with decay, so that matrices and others differ."""
    module = student_of(case, format=format)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    layout = LongParameters(module, CPU) if long else None
    module.replay = Recording(module, layout) if long else None
    stage = DistillStage(batch_sequences=2, learning_rate=1e-2, weight_decay=0.1, warmup=0)
    student = StudentConfig(workers=RANKS, micro_batch=1, zero=zero)  # type: ignore[arg-type]
    engine = start_engine(layout or module, stage=stage, student=student, steps=10, dtype=torch.float32)
    if layout is not None:
        layout.adopt()
    losses = []
    for both in BATCHES:
        own = slice(rank, rank + 1)
        batch = TokenBatch(ids_BT=both.ids_BT[own], target_BT=both.target_BT[own], segment_BT=both.segment_BT[own],
                           sequence_ids=both.sequence_ids[own])  # fmt: skip
        totals = Totals.count(both.labels_BT, both.segment_BT).shared_by(RANKS)
        value, _ = engine(batch, said(case, batch), totals)
        engine.backward(value)
        engine.step()
        losses.append(value.detach())
    return losses, before, {name: p.detach().clone() for name, p in module.named_parameters()}


def rank_main(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(RANKS),
                      LOCAL_RANK=str(rank))  # fmt: skip
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    trained = [[train(rank, case, format, zero=zero, long=long) for long in (False, True)]
               for case, format, zero in RUNS]  # fmt: skip
    torch.save(trained, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_long_parameters_train_as_the_models_own_do(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(rank_main, (port, str(tmp_path)), nprocs=RANKS)
    for rank in range(RANKS):
        for (case, format, _), (own, long) in zip(RUNS, torch.load(tmp_path / f"{rank}.pt"), strict=True):
            torch.testing.assert_close(long, own, rtol=1e-5, atol=1e-6, msg=lambda m, c=case: f"{c}: {m}")
            losses, before, after = long
            assert len({float(loss) for loss in losses}) == len(losses)
            learned = {name for name in after if not torch.equal(after[name], before[name])}
            assert learned == set(after)
            assert any(name.endswith("alpha") for name in after) == (format is Format.SEQ2)


def test_the_models_parameters_are_views_of_the_long_ones() -> None:
    module = student_of("qwen2")
    plain = copy.deepcopy(module)
    layout = LongParameters(module, CPU)
    for (name, p), other in zip(module.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, other), name
    assert [p.ndim for p in layout.parameters()] == [1, 1]
    with torch.no_grad():
        layout.long[0].zero_()
    assert all(not p.any() for p in module.parameters() if p.ndim > 1)
    assert layout.matrices == [layout.long[0]]


def test_only_small_recorded_students_of_one_dtype_are_laid_out(monkeypatch: pytest.MonkeyPatch) -> None:
    module = student_of("llama")
    assert can_lay_out(module, zero=1, recorded=True)
    assert not can_lay_out(module, zero=1, recorded=False)
    assert not can_lay_out(module, zero=3, recorded=True)
    monkeypatch.setattr("bitdistill_ray.student.layout.MOST_WEIGHTS", 1000)
    assert not can_lay_out(module, zero=1, recorded=True)
    assert MOST_WEIGHTS > 135_000_000
    mixed = student_of("llama")
    mixed.model.model.norm.bfloat16()
    assert not can_lay_out(mixed, zero=1, recorded=True)


def test_own_parameters_are_named_as_they_are() -> None:
    module = student_of("gemma3")
    layout = OwnParameters(module)
    assert list(layout.named(layout.leaves())) == [name for name, _ in module.named_parameters()]
