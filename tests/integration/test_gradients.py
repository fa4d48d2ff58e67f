"""The distilled gradients are those of a teacher in the student's own process, for ZeRO 2 and 3 with two workers.

The remote side is the real one: teacher actor, feeder, Ray Train, DeepSpeed; its full gradients are read just before
the optimiser's first step.  The reference is one process, plain torch, the whole batch at once, and the same Teacher
object called directly.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from deepspeed.utils import safe_get_full_grad
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from safetensors.torch import load_file, save_file

from bitdistill_ray.config import Config
from bitdistill_ray.core import TeacherSignals
from bitdistill_ray.data.batch import token_batch
from bitdistill_ray.data.feeder import Feeder, start_feeder
from bitdistill_ray.losses.reduction import Totals
from bitdistill_ray.model.heads import LMHead
from bitdistill_ray.model.student import load_student
from bitdistill_ray.runs import RunFolder
from bitdistill_ray.stages import STAGES, StageContext
from bitdistill_ray.stages.corpus import corpus_of
from bitdistill_ray.student.job import Lesson, TrainJob
from bitdistill_ray.student.module import LossModule
from bitdistill_ray.student.monitor import Monitor
from bitdistill_ray.student.objective import objective_of
from bitdistill_ray.student.worker import Worker
from bitdistill_ray.teacher.actor import Teacher
from bitdistill_ray.teacher.pool import TeacherPool
from bitdistill_ray.teacher.request import SignalRequest
from tests.road import tiny_config

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(600)]

RELATION_LAYER = 1
LOSS = "{ce: 0.5, cakld: 1, gamma: 0.3, relation: {weight: 1, layer: 1, heads: 4}, states: {weight: 2, layers: [0, 1]}}"


def probe(settings: dict[str, Any]) -> None:
    """A worker that stops before its first optimiser step and writes down the full gradients."""
    worker = Worker(settings["job"])
    take_step = worker.engine.step

    def record_and_step() -> None:
        if worker.engine.is_gradient_accumulation_boundary():
            grads = {name: safe_get_full_grad(p) for name, p in worker.model.named_parameters()}
            if worker.rank == 0:
                save_file({n: g.float().contiguous() for n, g in grads.items()}, settings["file"])
        take_step()

    worker.engine.step = record_and_step
    worker.run()


@pytest.fixture(scope="module")
def refined(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Path:
    """A run with a student that no stage has trained yet, and a corpus of documents of very different lengths."""
    root = tmp_path_factory.mktemp("gradients")
    texts = [" ".join(["the cat sat on the mat"] * (1 + i % 7)) for i in range(60)]
    (root / "corpus.jsonl").write_text("\n".join(f'{{"text": "{text}"}}' for text in texts))
    context = StageContext(config(root, zero=2), "refine", RunFolder(config(root, zero=2)))
    context.run.finish(STAGES["refine"](context))
    return root


def config(root: Path, *, zero: int, dtype: str = "fp32") -> Config:
    return tiny_config(root, f"data={root}/corpus.jsonl", f"student.zero={zero}", f"student.dtype={dtype}",
                       f"teacher.dtype={dtype}", "student.workers=2", "stages.write=false", "stages.clip=false",
                       "stages.distill.batch_sequences=8", f"stages.distill.loss={LOSS}", "quant.format=int2",
                       "stages.distill.tokens=256", "student.chunk_tokens=24")  # fmt: skip


def in_one_process(root: Path, context: StageContext) -> dict[str, torch.Tensor]:
    """Gradients of the first step's global batch with the teacher in this process."""
    config_, dtype = context.config, torch.float32
    teacher = Teacher(config_.model.teacher, dtype=config_.teacher.dtype)
    feeder = Feeder(corpus_of(context, str(context.fetch("student"))), sequences_per_step=8)
    arrays = feeder.batch(0)
    feeder.close()
    batch = token_batch(arrays)
    signals = teacher.signals(batch, SignalRequest(attention_layer=RELATION_LAYER, states_layers=(0, 1)))
    model, _ = load_student(context.fetch("student"), dtype=dtype)
    loss = config_.stages["distill"].loss  # type: ignore[union-attr]
    module = LossModule(model, objective_of(loss), chunk_tokens=10_000, gamma=0.3, relation_layer=RELATION_LAYER,
                        states_layers=(0, 1), teacher_head=LMHead(teacher.model).frozen_copy())  # fmt: skip
    value, _ = module(batch, detached(signals), Totals.count(batch.labels_BT, batch.segment_BT))
    value.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def detached(signals: TeacherSignals) -> TeacherSignals:
    assert signals.hidden_BTD is not None
    assert not signals.hidden_BTD.requires_grad
    return signals


@pytest.mark.parametrize("zero", [pytest.param(2, marks=pytest.mark.soak), 3])
def test_remote_teacher_gives_the_same_gradients(refined: Path, tmp_path: Path, zero: int) -> None:
    settings = config(refined, zero=zero)
    run = RunFolder(settings)
    context = StageContext(settings, "distill", run)
    reference = in_one_process(refined, context)
    stage = settings.stages["distill"]
    pool = TeacherPool.start(settings.model.teacher, settings.teacher)
    monitor = ray.remote(Monitor).remote(run.storage, f"zero{zero}")  # type: ignore[attr-defined]
    feeder = start_feeder(corpus_of(context, str(context.fetch("student"))), sequences_per_step=8)
    job = TrainJob(config=settings, stage_name="distill", run=run, loss=stage.loss, steps=1,  # type: ignore[union-attr]
                   source=context.earlier("student"), model_source=None, output=f"probe-{zero}", feeder=feeder,
                   monitor=monitor, relation_layer=RELATION_LAYER)  # fmt: skip
    monitor.teach.remote(Lesson(teachers=pool.handles, gamma=0.3))
    file = tmp_path / "gradients.safetensors"
    try:
        TorchTrainer(
            probe,
            train_loop_config={"job": job, "file": str(file)},
            scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}),
            run_config=RunConfig(name=f"zero{zero}", storage_path=str(tmp_path / "train")),
        ).fit()
    finally:
        pool.shutdown()
        for actor in (monitor, feeder):
            ray.kill(actor)
    remote = load_file(file)
    assert set(remote) == set(reference)
    for name, expected in reference.items():
        scale = expected.abs().max()
        assert scale > 0, name
        torch.testing.assert_close(remote[name], expected, rtol=1e-4, atol=1e-5 * float(scale), msg=name)
