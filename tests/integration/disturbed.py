"""Student workers to which something happens at a given step, as Ray Train's entry.

Ray Train's controller imports the module of its entry before it starts a worker: as in `student/entry.py`, nothing
heavy is imported before a worker runs.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from bitdistill_ray.student.entry import attempt
from bitdistill_ray.student.job import TrainJob

if TYPE_CHECKING:
    from bitdistill_ray.student.worker import Worker

MICROS = 2  # of a step


def worker_of(settings: dict[str, TrainJob]) -> Worker:
    from bitdistill_ray.student.worker import Worker

    return Worker(settings["job"])


def disturbed(worker: Worker, acts: dict[int, Callable[[], object]]) -> None:
    """Run `worker`; before its n-th micro-batch, from 0, takes effect on the gradients, `acts[n]` happens."""
    take_step, taken = worker.engine.step, [0]
    assert worker.micros == MICROS

    def step() -> None:
        acts.get(taken[0], lambda: None)()
        taken[0] += 1
        take_step()

    worker.engine.step = step
    worker.run()


def beside_dying_teachers(settings: dict[str, TrainJob]) -> None:
    """One of two teachers stands still, gets a question and is killed; later both are."""
    from tests.teacher.pools import process_of

    worker = worker_of(settings)
    client = worker.client
    asked: list[Any] = []
    stopped: list[int] = []
    ask = client.ask
    client.ask = lambda batch: asked.append(ask(batch)) or asked[-1]

    def stop_one() -> None:
        stopped.append(process_of(client.membership.teachers[0]))  # it has answered what came before
        os.kill(stopped[0], signal.SIGSTOP)

    def kill_one() -> None:
        waiting = [ticket for ticket in asked if ticket.teacher == 0 and ticket.answer is not None]
        assert [ticket for ticket in waiting if not ray.wait([ticket.answer], timeout=0)[0]]
        os.kill(stopped[0], signal.SIGKILL)

    def kill_all() -> None:
        for handle in client.membership.teachers.values():
            os.kill(process_of(handle), signal.SIGKILL)

    disturbed(worker, {MICROS - 1: stop_one, 2 * MICROS - 1: kill_one, 5 * MICROS: kill_all})


def with_a_feeder_that_dies(settings: dict[str, TrainJob]) -> None:
    """It is killed in step 4 and has to read the corpus again for step 6, which is asked for when step 5 begins."""
    worker = worker_of(settings)
    disturbed(worker, {5 * MICROS - 1: lambda: ray.kill(worker.job.feeder, no_restart=False)})


def on_nodes_that_go(settings: dict[str, TrainJob]) -> None:
    """In step 3 the teacher's node goes, in step 6 that of this worker, once; each time the worker stands still."""
    worker = worker_of(settings)
    folder = Path(worker.job.run.storage.url)

    def lose(name: str) -> None:
        if (folder / name).exists():
            return
        (folder / name).touch()
        deadline = time.monotonic() + 120
        while not (folder / f"{name} went").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)

    disturbed(worker, {3 * MICROS: lambda: lose("teacher"), 6 * MICROS: lambda: lose("student")})


def signals_the_driver(settings: dict[str, TrainJob]) -> None:
    """The driver gets SIGTERM in the third step of the attempt, another signal in the first."""
    attempt(settings["job"], _signals_the_driver)


def _signals_the_driver(job: TrainJob) -> None:
    worker = worker_of({"job": job})
    process, number = (int(word) for word in (Path(worker.job.run.storage.url) / "driver").read_text().split())

    def signal_it() -> None:
        os.kill(process, number)
        while not ray.get(worker.job.monitor.is_stopping.remote()):
            time.sleep(0.05)

    disturbed(worker, {2 * MICROS if number == signal.SIGTERM else 0: signal_it})


def interrupted(settings: dict[str, TrainJob], plan: tuple[tuple[int, int], ...]) -> None:
    """A worker whose process gets signals: of each (signal, step) in turn, in that step of an attempt, from 0."""
    worker = worker_of(settings)
    came = Path(worker.job.run.storage.url) / "signals"
    number, at = (*plan, (0, -1))[len(came.read_text().split()) if came.exists() else 0]

    def signal_it() -> None:
        with came.open("a") as file:
            file.write(f"{number} ")
        os.kill(os.getpid(), number)
        assert worker.notice.told.wait(60)

    disturbed(worker, {at * worker.micros: signal_it})


def told_to_stop_and_killed(settings: dict[str, TrainJob]) -> None:
    interrupted(settings, ((signal.SIGTERM, 2), (signal.SIGKILL, 1)))


def told_to_stop_once(settings: dict[str, TrainJob]) -> None:
    interrupted(settings, ((signal.SIGTERM, 4),))


def nan_loss(settings: dict[str, TrainJob]) -> None:
    """A worker whose model gives no finite loss."""
    worker = worker_of(settings)
    worker.model.get_input_embeddings().weight.data.fill_(float("nan"))
    worker.run()


def infinite_gradient(settings: dict[str, TrainJob]) -> None:
    """A worker whose loss is fine and whose gradient is not."""
    worker = worker_of(settings)
    worker.model.get_input_embeddings().weight.register_hook(lambda grad: grad * float("inf"))
    worker.run()
