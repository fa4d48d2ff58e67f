"""A training step of the real worker: what the live teacher costs it, what the quantisers do, what the chunks save.

    step        with a live teacher on the wire (hidden states and Q, K, V of the last layer), limited by the same step
                with the answers already in memory
                with quantised linears, beside the same step of the plain model
    arithmetic  of the step, limited by the device's peak where it is known (the share is the MFU)
    loss        in chunks of tokens, beside the plain formula on all tokens at once: peak memory and time

Steps run inside Ray Train, under DeepSpeed, as in a run; only the tokens are random.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import ray
import ray.train
import torch
from ray.exceptions import RayError
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from bitdistill_ray.bench.batches import RandomFeeder
from bitdistill_ray.bench.cluster import Machine
from bitdistill_ray.bench.models import Size, save_random
from bitdistill_ray.bench.report import Row, Unit
from bitdistill_ray.bench.timing import WINDOWS, seconds_per_call
from bitdistill_ray.config import Config
from bitdistill_ray.core import QuantSpec, TeacherSignals
from bitdistill_ray.data.batch import BatchArrays
from bitdistill_ray.loss_config import LossConfig, RelationConfig
from bitdistill_ray.model.load import load_model
from bitdistill_ray.model.student import save_student
from bitdistill_ray.model.surgery import quantize_linears
from bitdistill_ray.ray_errors import user_error
from bitdistill_ray.runs import RunFolder
from bitdistill_ray.shape import read_shape
from bitdistill_ray.stage_config import DistillStage, SourceConfig
from bitdistill_ray.student.figures import Figures
from bitdistill_ray.student.flops import TERA, Arithmetic
from bitdistill_ray.student.inbox import Inbox, Share
from bitdistill_ray.student.job import Lesson, TrainJob
from bitdistill_ray.student.monitor import Monitor
from bitdistill_ray.student.worker import Worker
from bitdistill_ray.teacher.pool import TeacherPool

WARM_UP = 3  # steps
STEPS_OF_A_WINDOW = 4  # which follow each other as in a run, where a step's figures are read in the next
STAGE, PLAIN, MEASURED, RELATION = "distill", "plain", "measured", "hidden + Q, K, V"


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is measured: the random model, a step of `sequences` x `tokens`, a loss alone of `loss_tokens`."""

    model: Size
    sequences: int
    tokens: int
    loss_tokens: int
    loss_chunk: int
    loss_hidden: int
    loss_vocabulary: int


SMALL = Load(model=Size(hidden=256, layers=4, vocabulary=4096), sequences=4, tokens=64,
             loss_tokens=512, loss_chunk=64, loss_hidden=256, loss_vocabulary=16384)  # fmt: skip
LARGE = Load(model=Size(hidden=1024, layers=28, vocabulary=151_936, context=2048, heads=16, head_size=128),
             sequences=8, tokens=2048,
             loss_tokens=8192, loss_chunk=4096, loss_hidden=1024, loss_vocabulary=151_936)  # fmt: skip
MEDIUM = Load(model=Size(hidden=576, layers=30, vocabulary=49_152, context=2048, heads=9, key_heads=3, ffn=1536),
              sequences=8, tokens=2048,
              loss_tokens=16_384, loss_chunk=2048, loss_hidden=576, loss_vocabulary=49_152)  # fmt: skip
LOADS = {"small": SMALL, "135m": MEDIUM, "0.6b": LARGE}

Measured = dict[str, dict[str, float]]
"""Seconds of a step, `live` and from `memory`, and `flops`, the operations of a step, by the name of the job."""


def measure(source: str | None, specs: Sequence[QuantSpec], machine: Machine, load: Load = SMALL) -> list[Row]:
    """Rows of one student in each format, taught by the plain model it came from: `source`, or a random one."""
    with tempfile.TemporaryDirectory() as folder:
        source = source or save_random(Path(folder) / "teacher", load.model)
        config = config_of(source, machine.config, folder, load)
        pool = TeacherPool.start(source, config.teacher, config.storage)
        feeder = ray.remote(RandomFeeder).options(num_cpus=0).remote(load.sequences, load.tokens, vocabulary(source))
        monitor = ray.remote(Monitor).options(num_cpus=0).remote(RunFolder(config).storage, STAGE)
        try:
            jobs = _jobs(source, specs, config, pool, feeder=feeder, monitor=monitor)
            measured = _on_a_worker(jobs, config, folder, monitor)
        finally:
            pool.shutdown()
            for actor in (feeder, monitor):
                ray.kill(actor)
    threads = machine.threads if machine.device == "cpu" else None
    rows = [row for spec in specs for row in _step_rows(spec, measured[_name(spec)], measured[PLAIN], threads)]
    return [_live_row(specs[0], RELATION, measured[RELATION], threads), *rows]


def config_of(source: str, base: Config, folder: str, load: Load) -> Config:
    """`base` with the steps of `load` in a run below `folder`: as many sequences for each student worker."""
    stage = DistillStage(batch_sequences=load.sequences * base.student.workers,
                         sources=(SourceConfig(path="random tokens"),), loss=LossConfig(forward_kl=1.0))  # fmt: skip
    student = {"micro_batch": load.sequences, "chunk_tokens": load.loss_chunk}
    return base.model_copy(
        update={
            "run": f"{folder}/run",
            "model": base.model.model_copy(update={"teacher": source}),
            "data": base.data.model_copy(update={"sequence_length": load.tokens}),
            "student": base.student.model_copy(update=student),
            "stages": {STAGE: stage},
        }
    )


def vocabulary(source: str) -> int:
    """How many tokens the model at `source` knows."""
    return read_shape(source).vocabulary


def _name(spec: QuantSpec) -> str:
    return f"{spec.format}:a{spec.activation_bits or 16}"


def job_of(
    config: Config, pool: TeacherPool, *, source: str | None, model_source: str | None, **actors: Any
) -> TrainJob:
    """A job whose student is published in the run at `source`, or loaded from `model_source`; its monitor is told of
    the pool."""
    actors["monitor"].teach.remote(Lesson(teachers=pool.roster))
    return TrainJob(
        config=config,
        stage_name=STAGE,
        run=RunFolder(config),
        loss=LossConfig(forward_kl=1.0),
        steps=1000,
        output="unused",
        source=source,
        model_source=model_source,
        **actors,
    )


def publish_student(config: Config, teacher: str, spec: QuantSpec) -> str:
    """Quantise the model at `teacher` into the run; returns where in the run it lies."""
    model, tokenizer = load_model(teacher, dtype=torch.float32)
    quantize_linears(model, spec)
    with RunFolder(config).publish(f"students/{_name(spec)}") as published:
        save_student(published / "latent", model, tokenizer)
    return f"students/{_name(spec)}/latent"


def _jobs(
    source: str, specs: Sequence[QuantSpec], config: Config, pool: TeacherPool, **actors: Any
) -> dict[str, TrainJob]:
    """The job of each format, of the plain model, and of the first format with relations of the last layer."""
    job = partial(job_of, config, pool, **actors)
    jobs = {PLAIN: job(source=None, model_source=source)}
    for spec in specs:
        jobs[_name(spec)] = job(source=publish_student(config, source, spec), model_source=None)
    relations = LossConfig(forward_kl=1.0, relation=RelationConfig(weight=1.0, heads=None))
    layers = read_shape(source).layers
    return {
        RELATION: dataclasses.replace(jobs[_name(specs[0])], loss=relations, relation_layer=layers - 1),
        **jobs,
    }


def _on_a_worker(
    jobs: Mapping[str, TrainJob], config: Config, folder: str, monitor: Any
) -> dict[str, dict[str, float]]:
    """`measure_steps` in one Ray Train worker."""
    fit(measure_steps, {"jobs": jobs}, config, folder)
    row: dict[str, Measured] = ray.get(monitor.own_rows.remote())[-1]
    return row[MEASURED]


def fit(function: Any, settings: Mapping[str, Any], config: Config, folder: str) -> None:
    """Run `function(settings)` in the student workers that `config` asks for."""
    student = config.student
    trainer = TorchTrainer(
        function,
        train_loop_config=dict(settings),
        scaling_config=ScalingConfig(
            num_workers=student.workers,
            use_gpu=student.gpus > 0,
            resources_per_worker=student.resources,
        ),
        run_config=RunConfig(name="bench", storage_path=folder),
    )
    try:
        trainer.fit()
    except (RayError, ray.train.TrainingFailedError) as error:
        raise user_error(error) or error from None


def measure_steps(settings: Mapping[str, Mapping[str, TrainJob]]) -> None:
    """Ray Train's entry: gives the monitor, for each job by name, the seconds of a step `live` and from `memory`."""
    workers = {name: Worker(job) for name, job in settings["jobs"].items()}
    device = next(iter(workers.values())).device
    live = {name: _live_s(worker) for name, worker in workers.items()}
    remembered = {name: remembering(worker) for name, worker in workers.items()}
    memory = seconds_per_call(remembered, device=device, least_calls=STEPS_OF_A_WINDOW)
    flops = {name: _step_flops(worker) for name, worker in workers.items()}
    row = {
        "step": 0,
        MEASURED: {name: {"live": live[name], "memory": memory[name], **flops[name]} for name in workers},
    }
    ray.get(next(iter(workers.values())).job.monitor.step.remote(row))


def _step_flops(worker: Worker) -> dict[str, float]:
    """Operations of a step of this worker, and its device's peak where that is known."""
    length, sequences = worker.job.config.data.sequence_length, worker.job.stage.batch_sequences
    cost = Arithmetic.of(worker.model, length=length, device=worker.device, workers=1)
    known = {} if cost.peak is None else {"peak": cost.peak}
    return {"flops": cost.token_flops * sequences * length, **known}


def _live_s(worker: Worker) -> float:
    """Median seconds from step to step, with everything a step waits for; its loss is read when a run would read it."""
    share, steps = Share(rank=0, ranks=1, micros=worker.micros), WARM_UP + 3 * WINDOWS
    inbox = Inbox(worker.job.feeder, worker.client, share, first=0, steps=steps,
                  in_flight=worker.job.config.teacher.in_flight)  # fmt: skip
    ends, unread = list[float](), deque[Figures]()
    for micros in inbox:
        losses, _ = worker.step(micros, inbox.signals, inbox.take_up)
        unread.append(Figures(losses))
        if len(unread) > worker.late:
            unread.popleft().read()
            ends.append(time.perf_counter())
    return median(after - before for before, after in zip(ends[WARM_UP - 1 :], ends[WARM_UP:], strict=False))


def remembering(worker: Worker) -> Any:
    """One step on the first batch, whose answers are asked for here once."""
    share: dict[str, int] = {"rank": worker.rank, "ranks": worker.ranks, "micros": worker.micros}
    micros: list[BatchArrays] = [
        ray.get(worker.job.feeder.batch.remote(0, micro=micro, **share)) for micro in range(worker.micros)
    ]
    assert worker.client is not None
    answers: dict[int, TeacherSignals] = {
        id(arrays): worker.client.answer(worker.client.ask(arrays), arrays, worker.device) for arrays in micros
    }
    return lambda: worker.step(micros, lambda arrays, _: answers[id(arrays)])


def _live_row(spec: QuantSpec, what: str, measured: Mapping[str, float], threads: int | None) -> Row:
    return Row(case=f"training step, live teacher, {what}", format=spec.format.value, threads=threads, metric="step",
               unit=Unit.MILLISECONDS, value=measured["live"] * 1e3, limit=measured["memory"] * 1e3,
               limit_is="the same step with the teacher's answers already in memory")  # fmt: skip


def _step_rows(
    spec: QuantSpec, measured: Mapping[str, float], plain: Mapping[str, float], threads: int | None
) -> list[Row]:
    shared: dict[str, Any] = {
        "case": "training step, answers in memory",
        "format": spec.format.value,
        "threads": threads,
    }
    seconds, peak = measured["memory"], measured.get("peak")
    return [
        _live_row(spec, "hidden", measured, threads),
        Row(**shared, metric="step", unit=Unit.MILLISECONDS, value=seconds * 1e3, baseline=plain["memory"] * 1e3,
            baseline_is="the same step of the model that is not quantised"),
        Row(**shared, metric="arithmetic", unit=Unit.TFLOP_S, value=measured["flops"] / seconds / TERA,
            limit=None if peak is None else peak / TERA, limit_is="dense bf16 peak of the data sheet",
            baseline=plain["flops"] / plain["memory"] / TERA, baseline_is="the step that is not quantised"),
    ]  # fmt: skip
