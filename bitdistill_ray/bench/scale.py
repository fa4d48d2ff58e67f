"""Student workers at constant work each: the step of one beside the step of all of them, answers in memory.

The teacher answers once and then stands idle, so that students may have nearly all of the GPU that it stands on.
"""

from __future__ import annotations

import sys
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
from bitdistill_ray.bench.timing import WINDOWS, window
from bitdistill_ray.bench.train import (
    STAGE,
    STEPS_OF_A_WINDOW,
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
        config = config_of(source, _shared(machine, workers), folder, load)
        student = publish_student(config, source, spec)
        pool = TeacherPool.start(source, config.teacher, config.storage)
        try:
            seconds = {n: _step_s(n, config, pool, student, folder, load) for n in (1, workers)}
        finally:
            pool.shutdown()
    return [
        Row(case=f"training step of {workers} workers, answers in memory", format=spec.format.value,
            threads=machine.threads // workers if machine.device == "cpu" else None, metric="step",
            unit=Unit.MILLISECONDS, value=seconds[workers] * 1e3, limit=seconds[1] * 1e3,
            limit_is=f"the step of one worker, as much work for each ({load.sequences} x {load.tokens} tokens)"),
    ]  # fmt: skip


def _shared(machine: Machine, workers: int) -> Config:
    """`workers` students and one teacher, each with its part of the CPU threads."""
    threads, gpu = max(1, machine.threads // workers), machine.device == "cuda"
    base = machine.config
    student = {"workers": workers, "threads": threads, "gpus": 1 - TEACHER_SHARE if gpu else 0, "cpus": 0.5}
    teacher = {"threads": threads, "gpus": TEACHER_SHARE if gpu else 0, "cpus": 0.5}
    return base.model_copy(
        update={
            "student": base.student.model_copy(update=student),
            "teacher": base.teacher.model_copy(update=teacher),
        }
    )


def _step_s(workers: int, most: Config, pool: TeacherPool, student: str, folder: str, load: Load) -> float:
    """The median step of `workers` of the students of `most`; `student` is where in the run they begin."""
    base = most.model_copy(update={"student": most.student.model_copy(update={"workers": workers})})
    source = most.model.teacher
    config = config_of(source, base, folder, load)
    sequences = load.sequences * workers
    feeder = ray.remote(RandomFeeder).options(num_cpus=0).remote(sequences, load.tokens, vocabulary(source))
    monitor = ray.remote(Monitor).options(num_cpus=0).remote(RunFolder(config).storage, STAGE)
    try:
        job = job_of(config, pool, source=student, model_source=None, feeder=feeder, monitor=monitor)
        began = time.perf_counter()
        fit(measure_step, {"job": job}, config, folder)
        step_s = float(ray.get(monitor.own_rows.remote())[-1]["step_s"])
        print(f"{workers} workers: {step_s * 1e3:.1f} ms a step, measured in {time.perf_counter() - began:.0f} s",
              file=sys.stderr, flush=True)  # fmt: skip
        return step_s
    finally:
        for actor in (feeder, monitor):
            ray.kill(actor)


def measure_step(settings: Mapping[str, TrainJob]) -> None:
    """Ray Train's entry, in every worker: rank 0 gives the monitor the median seconds of a step."""
    worker = Worker(settings["job"])
    step: Any = remembering(worker)
    for _ in range(WARM_UP):
        step()
    seconds = median(window(step, STEPS_OF_A_WINDOW, worker.device) for _ in range(WINDOWS))
    if worker.rank == 0:
        ray.get(worker.job.monitor.step.remote({"step": 0, "step_s": seconds}))
