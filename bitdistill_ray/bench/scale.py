"""Student workers at constant work each: the step of one beside the step of all of them, answers in memory.

The teacher answers once and then stands idle, so that students may have nearly all of the GPU that it stands on.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import ray

from bitdistill_ray.bench.batches import RandomFeeder
from bitdistill_ray.bench.cluster import Machine
from bitdistill_ray.bench.models import save_random
from bitdistill_ray.bench.report import Row, Unit
from bitdistill_ray.bench.timing import WINDOWS, synchronize
from bitdistill_ray.bench.train import (
    STAGE,
    WARM_UP,
    Load,
    config_of,
    fit,
    job_of,
    publish_student,
    remembering,
    vocabulary,
)
from bitdistill_ray.config import Config
from bitdistill_ray.core import QuantSpec
from bitdistill_ray.runs import RunFolder
from bitdistill_ray.student.job import TrainJob
from bitdistill_ray.student.monitor import Monitor
from bitdistill_ray.student.worker import Worker
from bitdistill_ray.teacher.pool import TeacherPool

TEACHER_SHARE = 0.1  # of a GPU


def measure(source: str | None, spec: QuantSpec, machine: Machine, load: Load, workers: int) -> list[Row]:
    """One row: the step of `workers` students, limited by the step of one with as much work as each of them has."""
    with tempfile.TemporaryDirectory() as folder:
        source = source or save_random(Path(folder) / "teacher", load.model)
        seconds = {n: _step_s(source, spec, _base(machine, n, workers), f"{folder}/{n}", load) for n in (1, workers)}
    return [
        Row(case=f"training step of {workers} workers, answers in memory", format=spec.format.value,
            threads=machine.threads // workers if machine.device == "cpu" else None, metric="step",
            unit=Unit.MILLISECONDS, value=seconds[workers] * 1e3, limit=seconds[1] * 1e3,
            limit_is=f"the step of one worker, as much work for each ({load.sequences} x {load.tokens} tokens)"),
    ]  # fmt: skip


def _base(machine: Machine, now: int, most: int) -> Config:
    """`now` students, each with the CPU threads that it has among `most`."""
    threads, gpu = max(1, machine.threads // most), machine.device == "cuda"
    base = machine.config
    student = {"workers": now, "threads": threads, "gpus": 1 - TEACHER_SHARE if gpu else 0, "cpus": 0.5}
    teacher = {"threads": threads, "gpus": TEACHER_SHARE if gpu else 0, "cpus": 0.5}
    return base.model_copy(
        update={
            "student": base.student.model_copy(update=student),
            "teacher": base.teacher.model_copy(update=teacher),
        }
    )


def _step_s(source: str, spec: QuantSpec, base: Config, folder: str, load: Load) -> float:
    config = config_of(source, base, folder, load)
    pool = TeacherPool.start(source, config.teacher, config.storage)
    sequences = load.sequences * config.student.workers
    feeder = ray.remote(RandomFeeder).options(num_cpus=0).remote(sequences, load.tokens, vocabulary(source))
    monitor = ray.remote(Monitor).options(num_cpus=0).remote(RunFolder(config).storage, STAGE)
    try:
        job = job_of(config, pool, source=publish_student(config, source, spec), model_source=None, feeder=feeder,
                     monitor=monitor)  # fmt: skip
        fit(measure_step, {"job": job}, config, folder)
        return float(ray.get(monitor.own_rows.remote())[-1]["step_s"])
    finally:
        pool.shutdown()
        for actor in (feeder, monitor):
            ray.kill(actor)


def measure_step(settings: Mapping[str, TrainJob]) -> None:
    """Ray Train's entry, in every worker: rank 0 gives the monitor the median seconds of a step."""
    worker = Worker(settings["job"])
    step: Any = remembering(worker)
    ends = []
    for _ in range(WARM_UP + WINDOWS):
        step()
        synchronize(worker.device)
        ends.append(time.perf_counter())
    seconds = median(after - before for before, after in zip(ends[WARM_UP - 1 :], ends[WARM_UP:], strict=False))
    if worker.rank == 0:
        ray.get(worker.job.monitor.step.remote({"step": 0, "step_s": seconds}))
