"""A training step of the real worker: what the live teacher costs it, what the quantisers do, what the chunks save.

    step    with a live teacher on the wire, limited by the same step with the answers already in memory
            with quantised linears, beside the same step of the plain model
    loss    in chunks of tokens, beside all tokens at once: peak memory and time

Steps run inside Ray Train, under DeepSpeed, as in a run; only the tokens are random.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
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
from torch import nn

from bitdistill_ray.bench.batches import RandomFeeder
from bitdistill_ray.bench.cluster import Machine
from bitdistill_ray.bench.memory import peak_bytes
from bitdistill_ray.bench.models import Size, save_random
from bitdistill_ray.bench.report import Row, Unit
from bitdistill_ray.bench.timing import WINDOWS, seconds_per_call, synchronize
from bitdistill_ray.config import Config
from bitdistill_ray.core import QuantSpec, TeacherSignals
from bitdistill_ray.data.batch import BatchArrays
from bitdistill_ray.losses.chunked import chunked_loss
from bitdistill_ray.losses.objective import Objective, Term, TermKind
from bitdistill_ray.model.load import load_model
from bitdistill_ray.model.student import save_student
from bitdistill_ray.model.surgery import quantize_linears
from bitdistill_ray.ray_errors import user_error
from bitdistill_ray.runs import RunFolder
from bitdistill_ray.stage_config import DistillStage, LossConfig, SourceConfig
from bitdistill_ray.student.inbox import Inbox, Share
from bitdistill_ray.student.job import TrainJob
from bitdistill_ray.student.monitor import Monitor
from bitdistill_ray.student.worker import Worker
from bitdistill_ray.teacher.pool import TeacherPool

SIZE = Size(hidden=256, layers=4, vocabulary=4096)
SEQUENCES, TOKENS = 4, 64  # of one step
WARM_UP = 3  # steps
STAGE, PLAIN, MEASURED = "distill", "plain", "measured"
LOSS_TOKENS, LOSS_CHUNK, LOSS_HIDDEN, LOSS_VOCABULARY = 512, 64, 256, 16384

Measured = dict[str, dict[str, float]]
"""Seconds of a step, `live` and from `memory`, by the name of the job."""


def measure(source: str | None, specs: Sequence[QuantSpec], machine: Machine) -> list[Row]:
    """Rows of one student in each format, taught by the plain model it came from: `source`, or a random one."""
    with tempfile.TemporaryDirectory() as folder:
        source = source or save_random(Path(folder) / "teacher", SIZE)
        config = _config(source, machine, folder)
        pool = TeacherPool.start(source, config.teacher, config.storage)
        feeder = ray.remote(RandomFeeder).options(num_cpus=0).remote(SEQUENCES, TOKENS, _vocabulary(source))
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
    return rows + _loss_rows(torch.device(machine.device), threads)


def _config(source: str, machine: Machine, folder: str) -> Config:
    stage = DistillStage(batch_sequences=SEQUENCES, sources=(SourceConfig(path="random tokens"),),
                         loss=LossConfig(forward_kl=1.0))  # fmt: skip
    base = machine.config
    return base.model_copy(
        update={
            "run": f"{folder}/run",
            "model": base.model.model_copy(update={"teacher": source}),
            "data": base.data.model_copy(update={"sequence_length": TOKENS}),
            "student": base.student.model_copy(update={"micro_batch": SEQUENCES}),
            "stages": {STAGE: stage},
        }
    )


def _vocabulary(source: str) -> int:
    return int(load_model(source, dtype=torch.bfloat16)[0].config.vocab_size)


def _name(spec: QuantSpec) -> str:
    return f"{spec.format}:a{spec.activation_bits or 16}"


def _jobs(
    source: str, specs: Sequence[QuantSpec], config: Config, pool: TeacherPool, **actors: Any
) -> dict[str, TrainJob]:
    """The job of each format, and of the plain model."""
    run = RunFolder(config)
    job = partial(
        TrainJob,
        config=config,
        stage_name=STAGE,
        run=run,
        loss=LossConfig(forward_kl=1.0),
        steps=1000,
        output="unused",
        teachers=pool.handles,
        **actors,
    )
    jobs = {PLAIN: job(source=None, model_source=source)}
    for spec in specs:
        model, tokenizer = load_model(source, dtype=torch.float32)
        quantize_linears(model, spec)
        with run.publish(f"students/{_name(spec)}") as published:
            save_student(published / "latent", model, tokenizer)
        jobs[_name(spec)] = job(source=f"students/{_name(spec)}/latent", model_source=None)
    return jobs


def _on_a_worker(
    jobs: Mapping[str, TrainJob], config: Config, folder: str, monitor: Any
) -> dict[str, dict[str, float]]:
    """`measure_steps` in one Ray Train worker."""
    student = config.student
    trainer = TorchTrainer(
        measure_steps,
        train_loop_config={"jobs": jobs},
        scaling_config=ScalingConfig(
            num_workers=1,
            use_gpu=student.gpus > 0,
            resources_per_worker={"CPU": student.cpus, **({"GPU": student.gpus} if student.gpus else {})},
        ),
        run_config=RunConfig(name="bench", storage_path=folder),
    )
    try:
        trainer.fit()
    except (RayError, ray.train.TrainingFailedError) as error:
        raise user_error(error) or error from None
    row: dict[str, Measured] = ray.get(monitor.own_rows.remote())[-1]
    return row[MEASURED]


def measure_steps(settings: Mapping[str, Mapping[str, TrainJob]]) -> None:
    """Ray Train's entry: gives the monitor, for each job by name, the seconds of a step `live` and from `memory`."""
    workers = {name: Worker(job) for name, job in settings["jobs"].items()}
    device = next(iter(workers.values())).device
    live = {name: _live_s(worker) for name, worker in workers.items()}
    remembered = {name: _remembering(worker) for name, worker in workers.items()}
    memory = seconds_per_call(remembered, device=device)
    row = {"step": 0, MEASURED: {name: {"live": live[name], "memory": memory[name]} for name in workers}}
    ray.get(next(iter(workers.values())).job.monitor.step.remote(row))


def _live_s(worker: Worker) -> float:
    """Median seconds from step to step, with everything a step waits for."""
    share, steps = Share(rank=0, ranks=1, micros=worker.micros), WARM_UP + WINDOWS
    inbox = Inbox(worker.job.feeder, worker.client, share, first=0, steps=steps,
                  in_flight=worker.job.config.teacher.in_flight)  # fmt: skip
    ends = []
    for micros in inbox:
        worker.step(micros, inbox.signals)
        synchronize(worker.device)
        ends.append(time.perf_counter())
    return median(after - before for before, after in zip(ends[WARM_UP - 1 :], ends[WARM_UP:], strict=False))


def _remembering(worker: Worker) -> Any:
    """One step on the first batch, whose answers are asked for here once."""
    micros: list[BatchArrays] = [
        ray.get(worker.job.feeder.batch.remote(0, micro=micro, micros=worker.micros)) for micro in range(worker.micros)
    ]
    assert worker.client is not None
    answers: dict[int, TeacherSignals] = {
        id(arrays): worker.client.answer(worker.client.ask(arrays), arrays, worker.device) for arrays in micros
    }
    return lambda: worker.step(micros, lambda arrays, _: answers[id(arrays)])


def _step_rows(
    spec: QuantSpec, measured: Mapping[str, float], plain: Mapping[str, float], threads: int | None
) -> list[Row]:
    shared: dict[str, Any] = {
        "format": spec.format.value,
        "threads": threads,
        "metric": "step",
        "unit": Unit.MILLISECONDS,
    }
    return [
        Row(**shared, case="training step, live teacher", value=measured["live"] * 1e3, limit=measured["memory"] * 1e3,
            limit_is="the same step with the teacher's answers already in memory"),
        Row(**shared, case="training step, answers in memory", value=measured["memory"] * 1e3,
            baseline=plain["memory"] * 1e3, baseline_is="the same step of the model that is not quantised"),
    ]  # fmt: skip


def _loss_rows(device: torch.device, threads: int | None) -> list[Row]:
    """Forward and backward pass of the loss alone, chunked and whole."""
    heads = [nn.Linear(LOSS_HIDDEN, LOSS_VOCABULARY, bias=False, device=device) for _ in range(2)]
    heads[1].requires_grad_(requires_grad=False)
    shape = (4, LOSS_TOKENS // 4, LOSS_HIDDEN)
    student_BTD, teacher_BTD = (torch.randn(shape, device=device) for _ in range(2))
    labels_BT = torch.randint(LOSS_VOCABULARY, shape[:2], device=device)
    signals = TeacherSignals(sequence_ids=("random",) * shape[0], hidden_BTD=teacher_BTD)
    objective = Objective(terms=(Term(kind=TermKind.FORWARD_KL),))

    def loss(chunk_tokens: int) -> None:
        hidden_BTD = student_BTD.clone().requires_grad_()
        heads[0].zero_grad()
        loss = chunked_loss(hidden_BTD, heads[0], signals, heads[1], labels_BT, objective, chunk_tokens=chunk_tokens)
        loss.value.backward()  # type: ignore[no-untyped-call]

    chunked, whole = partial(loss, LOSS_CHUNK), partial(loss, LOSS_TOKENS)
    times = seconds_per_call({"chunked": chunked, "whole": whole}, device=device, windows=5)
    shared: dict[str, Any] = {
        "case": f"loss of {LOSS_TOKENS} tokens in chunks of {LOSS_CHUNK}",
        "threads": threads,
        "baseline_is": f"all {LOSS_TOKENS} tokens at once, vocabulary {LOSS_VOCABULARY}",
    }
    return [
        Row(**shared, metric="peak memory", unit=Unit.MIB, value=peak_bytes(chunked, device) / 2**20,
            baseline=peak_bytes(whole, device) / 2**20),
        Row(**shared, metric="time", unit=Unit.MILLISECONDS, value=times["chunked"] * 1e3,
            baseline=times["whole"] * 1e3),
    ]  # fmt: skip
