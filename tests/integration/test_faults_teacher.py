"""A teacher pool that is gone, or was never there, is given up within its timeout, with its reason."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from bitdistill_ray.errors import TeacherError
from bitdistill_ray.teacher import wire
from bitdistill_ray.teacher.pool import TeacherPool
from bitdistill_ray.train import run
from tests.road import tiny_config
from tests.teacher.pools import batches, client_of, pool_config, process_of
from tests.tiny_models import save_tiny

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(1800)]

TRAIN_ONLY = ("stages.write=false", "stages.clip=false", "stages.export=false", "stages.evaluate=false")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    file.write_text("\n".join(f'{{"text": "the cat number {i} sat on the mat"}}' for i in range(100)))
    return file


@pytest.fixture(scope="module")
def overrides(corpus: Path) -> tuple[str, ...]:
    return (f"data={corpus}", *TRAIN_ONLY, "stages.distill.tokens=1024", "student.dtype=fp32", "teacher.dtype=fp32",
            "teacher.actors=2", "teacher.min_actors=1", "teacher.scale_every_s=10000", "teacher.cpus=0.5",
            "teacher.timeout_s=240", "student.max_failures=0")  # fmt: skip


def test_a_pool_that_is_gone_is_given_up_with_its_reason(tmp_path: Path) -> None:
    pool = TeacherPool.start(str(save_tiny(tmp_path / "teacher", "llama")), pool_config(2))
    client, [batch] = client_of(pool, timeout_s=3), batches(1)
    process = process_of(client.membership.teachers[0])
    os.kill(process, signal.SIGSTOP)  # so that it cannot have answered
    ticket = client.ask(wire.encode_batch(batch))
    assert ticket.teacher == 0
    pool.shutdown()
    with pytest.raises(TeacherError, match=r"^teacher: teacher 0 was lost \(\w+\); no other was there in 3 s"):
        client.answer(ticket, wire.encode_batch(batch))
    assert not any(client.outstanding.values())  # a reply of the registry may have taken the lost one off it


def test_a_run_that_joins_a_pool_that_is_not_there(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    with pytest.raises(TeacherError, match=r"teacher pool 'nonesuch': is not up on this cluster"):
        run(tiny_config(tmp_path, *overrides, "teacher.join=nonesuch"))
