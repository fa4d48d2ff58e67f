"""Training goes on when what is around the students fails: the teachers, the store.

Each fault is the real one, and sets in at a given step of the run; the rows are those of a run left alone, bit for bit.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import ray

from bitdistill_ray.stages import training
from bitdistill_ray.storage import Storage
from bitdistill_ray.student.job import TrainJob
from bitdistill_ray.student.worker import Worker
from bitdistill_ray.train import run
from tests.fault_proxy import fault_proxy
from tests.integration.curves import TEXT, overrides_of, rows_of, same_rows
from tests.road import tiny_config
from tests.teacher.pools import process_of

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(600)]

MICROS = 2  # of a step


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
    worker = Worker(settings["job"])
    client = worker.client
    asked, stopped, ask = [], [], client.ask
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


def test_teachers_that_are_killed_leave_the_same_rows(
    alone: Path, victim: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of two in the middle of a question, then both; the student itself is never restarted."""
    monkeypatch.setattr(training, "train_worker", beside_dying_teachers)
    root = victim.parent
    more = (
        "teacher.actors=2",
        "teacher.cpus=0.5",
        "teacher.in_flight=6",
        "teacher.timeout_s=120",
        "student.max_failures=0",
    )
    run(tiny_config(root, *overrides_of(root), *more, run=str(victim)))
    assert len(re.findall(r"teacher \d was lost \(\w+\): asking another", capsys.readouterr().out)) >= 2
    retries = [row["retries"] for row in rows_of(victim)]
    assert any(retries[:5])
    assert any(retries[5:])
    same_rows(victim, alone)


def with_a_feeder_that_dies(settings: dict[str, TrainJob]) -> None:
    """It is killed in step 4 and has to read the corpus again for step 6, which is asked for when step 5 begins."""
    worker = Worker(settings["job"])
    disturbed(worker, {5 * MICROS - 1: lambda: ray.kill(worker.job.feeder, no_restart=False)})


def test_a_store_that_is_away_for_20_seconds_leaves_the_same_rows(
    alone: Path, s3_endpoint: str, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """503, silence and hanging up in turn from the second checkpoint on, to it, to the cache and to the feeder.

    It is killed meanwhile, and begins anew with its tokenizer and the corpus.
    """
    monkeypatch.setattr(training, "train_worker", with_a_feeder_that_dies)
    root = alone.parent
    needed = ("encoder.json", "run/checkpoints/", "/cache/")  # the first is what a feeder reads first
    with fault_proxy(s3_endpoint) as proxy:
        storage = Storage(s3_bucket, endpoint_url=proxy.url)
        storage.write_bytes("corpus.jsonl", TEXT.encode())
        proxy.fail_for(20, "503", "silence", "hang up", since="run/checkpoints/distill/step-00000004", until=needed)
        run(tiny_config(
            root, *overrides_of(root), f"data={s3_bucket}/corpus.jsonl", f"storage.endpoint_url={proxy.url}",
            "storage.timeout_s=3", f"teacher.cache.folder={s3_bucket}/cache", "teacher.cache.block_sequences=4",
            "student.max_failures=0", "monitor.report=false", run=f"{s3_bucket}/run"))  # fmt: skip
        assert proxy.has_failed(*needed), proxy.failed
        same_rows(storage.child("run"), alone)
