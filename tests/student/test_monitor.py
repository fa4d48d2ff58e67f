"""Rows of a run: each step once, also after a restart, whatever earlier stages left in the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bitdistill_ray.errors import DataError
from bitdistill_ray.storage import Storage
from bitdistill_ray.student.monitor import FILE, Monitor


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(tmp_path / "run")


def rows_in(storage: Storage) -> list[dict[str, Any]]:
    return [json.loads(line) for line in storage.read_bytes(FILE).decode().splitlines()]


def monitor(storage: Storage, stage: str, *, every: float = 1e9) -> Monitor:
    opened = Monitor(storage, stage, flush_every_s=every)
    opened.flush()  # starts the clock
    return opened


def test_a_row_carries_its_stage_and_is_in_the_file_after_a_flush(storage: Storage) -> None:
    watching = monitor(storage, "distill")
    watching.step({"step": 0, "loss": 2.5})
    assert rows_in(storage) == []
    watching.flush()
    assert rows_in(storage) == [{"stage": "distill", "step": 0, "loss": 2.5}]


def test_rows_are_written_as_they_come_when_the_time_is_up(storage: Storage) -> None:
    watching = monitor(storage, "distill", every=-1.0)
    for step in range(3):
        watching.step({"step": step})
        assert [row["step"] for row in rows_in(storage)] == list(range(step + 1))


def test_a_stage_keeps_the_rows_of_those_before_it(storage: Storage) -> None:
    first = monitor(storage, "pretrain")
    first.step({"step": 0})
    first.flush()
    second = monitor(storage, "distill")
    second.step({"step": 0})
    second.flush()
    assert [(row["stage"], row["step"]) for row in rows_in(storage)] == [("pretrain", 0), ("distill", 0)]
    assert [row["stage"] for row in second.own_rows()] == ["distill"]


def test_a_restart_takes_back_the_rows_that_it_repeats_and_no_others(storage: Storage) -> None:
    before = monitor(storage, "pretrain")
    for step in range(6):
        before.step({"step": step, "loss": float(step)})
    before.flush()
    killed = monitor(storage, "distill")
    for step in range(5):
        killed.step({"step": step, "loss": 10.0})
    killed.flush()

    resumed = monitor(storage, "distill")
    resumed.rewind(3)
    for step in (3, 4, 5):
        resumed.step({"step": step, "loss": 20.0})
    resumed.flush()
    own = [(row["step"], row["loss"]) for row in rows_in(storage) if row["stage"] == "distill"]
    assert own == [(0, 10.0), (1, 10.0), (2, 10.0), (3, 20.0), (4, 20.0), (5, 20.0)]
    assert sum(row["stage"] == "pretrain" for row in rows_in(storage)) == 6
    assert [row["step"] for row in resumed.own_rows(since=4)] == [4, 5]


def test_a_refusal_is_kept_for_the_next_attempt(storage: Storage) -> None:
    watching = monitor(storage, "distill")
    assert watching.refusal() is None
    watching.refuse(DataError("corpus", "changed", "Start anew"))
    refusal = watching.refusal()
    assert isinstance(refusal, DataError)
    assert str(refusal) == "corpus: changed. Start anew"
