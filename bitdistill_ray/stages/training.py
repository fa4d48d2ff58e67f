"""`finetune`, `pretrain`, `distill`: one way of training with three starting points and three losses.

    finetune   the teacher's own model, cross-entropy in full precision; later stages use the result as their teacher
    pretrain   the quantised student on the stream (cross-entropy, or KL from the teacher, or both)
    distill    the quantised student against the teacher pool

The driver starts the feeder and the monitor, and side by side Ray Train's students and the teachers; when these are
there it measures CAKLD's gamma and hands the students what they wait for.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import ray
import ray.train
import torch
from ray.exceptions import RayActorError, RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from bitdistill_ray import env
from bitdistill_ray.config import Config
from bitdistill_ray.data.encoder import StoredEncoder, load_encoder
from bitdistill_ray.data.feeder import start_feeder
from bitdistill_ray.errors import BitdistillError
from bitdistill_ray.loss_config import LossConfig
from bitdistill_ray.model.load import readable
from bitdistill_ray.plan import steps
from bitdistill_ray.ray_errors import user_error
from bitdistill_ray.runs import StageRecord, storage_opener
from bitdistill_ray.sigterm import Terminated, sigterm_calls
from bitdistill_ray.stage_config import FinetuneStage, TrainStage
from bitdistill_ray.stages.base import StageContext, stage
from bitdistill_ray.stages.corpus import corpus_of, quality_windows
from bitdistill_ray.stages.fitting import NamesItself, fitting
from bitdistill_ray.stages.room import Room, placing
from bitdistill_ray.student.checkpoint import forget, full_disk
from bitdistill_ray.student.display import ProgressBar
from bitdistill_ray.student.entry import train_worker
from bitdistill_ray.student.job import Lesson, TrainJob
from bitdistill_ray.student.monitor import Monitor
from bitdistill_ray.student.objective import objective_of
from bitdistill_ray.student.preemption import preempted
from bitdistill_ray.teacher.pool import TeacherPool

TRACKERS_START_S = 300.0


@stage("finetune")
@stage("pretrain")
@stage("distill")
def train(context: StageContext) -> StageRecord:
    """Publish `student/` (or `teacher/` for finetune)."""
    options, config = context.stage, context.config
    assert isinstance(options, TrainStage)
    finetunes = isinstance(options, FinetuneStage)
    loss = LossConfig(ce=1.0) if isinstance(options, FinetuneStage) else options.loss
    role = "teacher" if finetunes else "student"
    tokenizer = str(context.fetch("student")) if context.earlier("student") else _teachers_folder(config)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)  # lost with us alone
    monitor = (
        ray.remote(Monitor).options(num_cpus=0, scheduling_strategy=here).remote(context.run.storage, context.name)
    )
    encoder = load_encoder(tokenizer)
    corpus = corpus_of(context, StoredEncoder.of(encoder, context.run.storage, context.path("encoder.json")))
    feeder = start_feeder(corpus, sequences_per_step=options.batch_sequences)
    job = TrainJob(
        config=config,
        stage_name=context.name,
        run=context.run,
        loss=loss,
        steps=steps(options, config.data.sequence_length),
        source=None if finetunes else context.earlier("student"),
        model_source=config.model.teacher if finetunes else None,
        output=context.path(role),
        feeder=feeder,
        monitor=monitor,
        relation_layer=_relation_layer(context, loss),
        quality=quality_windows(context, encoder) if config.monitor.quality_every else {},
    )
    with ExitStack() as stack:
        stack.callback(ray.kill, feeder)
        try:  # a corpus that cannot be read, a tracker that refuses: told before anything heavy starts
            ready = [feeder.open.remote(), monitor.track.remote(config.monitor)]
            ray.get(ready[0])
            ray.get(ready[1], timeout=TRACKERS_START_S)
        except RayError as error:
            raise user_error(error) or error from None

        def lesson() -> Lesson:
            if not loss.needs_teacher:
                return Lesson()
            pool = TeacherPool.open(context.teacher_source, config.teacher, config.storage, tokenizer=tokenizer)
            stack.callback(pool.shutdown)
            return Lesson(teachers=pool.roster, identity=pool.identity, gamma=_gamma(loss, pool, feeder, options))

        rows, gamma = _fit(job, context, lesson)
    ray.kill(monitor)  # where something failed it stays until the last worker has heard of it
    facts = {"steps": job.steps, "first_loss": round(rows[0]["loss"], 4), "last_loss": round(rows[-1]["loss"], 4)}
    if gamma is not None:
        facts["gamma"] = round(gamma, 4)
    return context.record({role: context.path(role)}, **facts)


def _relation_layer(context: StageContext, loss: LossConfig) -> int | None:
    """The teacher's layer that relations are taken from: the given one, or the one that was found."""
    if loss.relation is None:
        return None
    layer = loss.relation.layer
    return layer if isinstance(layer, int) else int(context.fact("search", "layer"))


def _teachers_folder(config: Config) -> str:
    """Where a tokenizer is before there is a student."""
    return readable(config.model.teacher, dtype=torch.float32, storage=storage_opener(config.storage))


def _fit(
    job: TrainJob, context: StageContext, lesson: Callable[[], Lesson]
) -> tuple[list[dict[str, Any]], float | None]:
    """Train to the end, restarting from checkpoints; returns the rows of `metrics.jsonl`, and gamma.

    `lesson()` starts the teachers, while Ray Train starts the students.
    """
    student, options, monitor = job.config.student, job.stage, job.monitor
    records = tempfile.TemporaryDirectory(prefix="ray-train-")  # Ray Train's own; the checkpoints are not there
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(
            num_workers=student.workers,
            use_gpu=student.gpus > 0,
            resources_per_worker=student.resources,
        ),
        run_config=RunConfig(
            name=context.name.replace("/", "-"),
            storage_path=records.name,
            failure_config=FailureConfig(
                max_failures=student.max_failures, controller_failure_limit=student.max_failures
            ),
            callbacks=[NamesItself(monitor)],
        ),
    )
    env.give_room_in(math.ceil(student.start_timeout_s / (student.max_failures + 1)))  # of each attempt
    room = Room(student, student.workers)
    try:
        bar = ProgressBar(monitor, job.steps, context.name, workers=student.workers,
                          every_s=job.config.monitor.line_every_s,
                          look=lambda: room.line(waiting=placing()))  # fmt: skip
        with records, bar, fitting(trainer, monitor) as outcome:
            taught = _teach(lesson, monitor)
            with sigterm_calls(lambda: _stop(monitor)):
                outcome.result()
    except (RayError, ray.train.TrainingFailedError) as error:
        refused = _refusal(monitor)
        if isinstance(error, ray.train.ControllerError) and room.waits:
            refused = room.error()
        known = user_error(error) or full_disk(error, context.run.storage) or preempted(error, f"stages.{context.name}")
        raise refused or known or error from None
    if refused := _refusal(monitor):  # workers that find one end without a word
        raise refused
    ray.get(monitor.finish.remote())
    if ray.get(monitor.is_stopping.remote()):
        raise Terminated
    rows: list[dict[str, Any]] = ray.get(monitor.own_rows.remote())
    forget(context.run.storage, context.name, best=options.keep_best)
    return rows, taught.gamma


def _teach(lesson: Callable[[], Lesson], monitor: Any) -> Lesson:
    """Hand the students their lesson; where there is none they are told, and end by themselves."""
    try:
        taught = lesson()
    except BitdistillError as error:
        monitor.refuse.remote(error)
        raise
    monitor.teach.remote(taught)
    return taught


def _refusal(monitor: Any) -> BitdistillError | None:
    found: BitdistillError | None = ray.get(monitor.refusal.remote())
    return found


def _stop(monitor: Any) -> None:
    print("SIGTERM: the run saves after the step it is in, and ends; another SIGTERM ends it at once", flush=True)
    monitor.stop.remote()


def _gamma(loss: LossConfig, pool: TeacherPool, feeder: Any, options: TrainStage) -> float | None:
    """CAKLD's scalar: given, or measured on the first sequences that the student will see."""
    mode = objective_of(loss).scalar_gamma
    if not isinstance(loss.gamma, str):
        return float(loss.gamma)
    if mode is None:
        return None
    handles = pool.handles
    batches = [feeder.batch.remote(step) for step in range(-(-loss.gamma_sequences // options.batch_sequences))]
    asked = [handles[i % len(handles)].confidence.remote(batch, mode) for i, batch in enumerate(batches)]
    estimates = []
    for batch, answer in zip(batches, asked, strict=True):
        try:
            estimates.append(ray.get(answer))
        except RayActorError:  # that teacher was lost
            estimates.append(pool.roster.call("confidence", batch, mode, timeout_s=pool.config.timeout_s))
        except RayError as error:
            raise user_error(error) or error from None
    total = sum(estimates[1:], start=estimates[0])
    print(
        f"gamma = {total.value:.4f}: the teacher's mean {loss.gamma} probability over {total.tokens} tokens", flush=True
    )
    return float(total.value)
