"""Training goes on when what is around the students fails: the teachers, the store.

Each fault is the real one, and sets in at a given step of the run; the rows are those of a run left alone, bit for bit.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bitdistill_ray.stages import training
from bitdistill_ray.storage import Storage
from bitdistill_ray.train import run
from tests.fault_proxy import fault_proxy
from tests.integration.curves import TEXT, overrides_of, rows_of, same_rows
from tests.integration.disturbed import beside_dying_teachers, with_a_feeder_that_dies
from tests.road import tiny_config

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(600)]


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
