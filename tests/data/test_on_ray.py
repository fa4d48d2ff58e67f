"""The cluster gives what one process gives: order, bytes, errors; also after the feeder was killed."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import ray

from bitdistill_ray.data import dataset
from bitdistill_ray.data.blocks import Block
from bitdistill_ray.data.dataset import RayReading, read_here, read_on_ray
from bitdistill_ray.data.encoder import Encoder, StoredEncoder
from bitdistill_ray.data.feeder import Feeder, start_feeder
from bitdistill_ray.data.ledger import Cursor
from bitdistill_ray.data.sources import CorpusSpec, Source
from bitdistill_ray.data.stream import Stream
from bitdistill_ray.data.units import list_units
from bitdistill_ray.errors import DataError, StorageError
from bitdistill_ray.ray_errors import user_error
from bitdistill_ray.storage import Storage

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session")]

PER_STEP = 6
ON_RAY = RayReading(concurrency=3)


@pytest.fixture
def corpus(corpus_folder: Path, tokenizer_folder: Path) -> CorpusSpec:
    return CorpusSpec(
        sources=(Source(str(corpus_folder)),), tokenizer=str(tokenizer_folder), sequence_length=48, seed=3, window=16
    )


def join(blocks: list[Block]) -> Block:
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def test_ray_data_gives_the_rows_of_one_process_in_their_order(
    corpus: CorpusSpec, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset, "FIRST_TASKS", 7)  # 22 tasks: plans of 7, 14 and 1
    monkeypatch.setattr(dataset, "TARGET_BLOCK_BYTES", 2000)  # about 4 rows: several blocks of one unit
    stream = Stream(corpus, list_units(corpus), lambda tasks: read_here(tasks, corpus, encoder))
    tasks = list(islice(stream.tasks(Cursor(unit=2, skip=3)), 22))
    here = join(list(read_here(iter(tasks), corpus, encoder)))
    there = join(list(read_on_ray(iter(tasks), corpus, encoder, ON_RAY)))
    assert here.keys() == there.keys()
    for name, array in here.items():
        assert array.dtype == there[name].dtype
        np.testing.assert_array_equal(array, there[name], err_msg=name)


def test_a_feeder_that_is_killed_answers_as_if_it_had_not_been(corpus: CorpusSpec, tmp_path: Path) -> None:
    expected = Feeder(corpus, sequences_per_step=PER_STEP)
    encoder = StoredEncoder.of(corpus.encoder(), Storage(tmp_path), "encoder.json")  # as a training stage does
    actor = start_feeder(replace(corpus, tokenizer=encoder), sequences_per_step=PER_STEP, reading=ON_RAY)
    for step in range(6):
        parts = [ray.get(actor.batch.remote(step, rank=rank, ranks=2)) for rank in range(2)]
        wanted = expected.batch(step)
        for name, array in wanted.items():
            np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), array)
    saved = ray.get(actor.state.remote(3))
    assert saved == expected.state(3)
    ray.kill(actor, no_restart=False)
    again = ray.get(actor.batch.remote(4, rank=0, ranks=3))
    np.testing.assert_array_equal(again["ids"], expected.batch(4, rank=0, ranks=3)["ids"])
    ray.kill(actor)

    resumed = start_feeder(corpus, sequences_per_step=PER_STEP, reading=ON_RAY, ledger=saved)
    for step in (4, 30):  # the second one passes later
        np.testing.assert_array_equal(ray.get(resumed.batch.remote(step))["ids"], expected.batch(step)["ids"])
        assert ray.get(resumed.state.remote(step)) == expected.state(step)
    ray.kill(resumed)
    expected.close()


def test_errors_cross_the_cluster_with_their_three_parts(tmp_path: Path, corpus: CorpusSpec) -> None:
    (tmp_path / "x.txt").write_bytes(b"fine \xff")
    damaged = replace(corpus, sources=(Source(str(tmp_path)),))
    feeder = Feeder(damaged, sequences_per_step=1, reading=ON_RAY)
    with pytest.raises(DataError, match=r"x\.txt: not UTF-8 at byte 5\.") as caught:
        feeder.batch(0)
    assert caught.value.where.endswith("x.txt")
    feeder.close()
    actor = start_feeder(damaged, sequences_per_step=1, reading=ON_RAY)
    with pytest.raises(DataError, match=r"x\.txt: not UTF-8 at byte 5\.") as crossed:
        ray.get(actor.batch.remote(0))
    found = user_error(crossed.value)
    assert isinstance(found, DataError)
    assert found.what == "not UTF-8 at byte 5"
    ray.kill(actor)
    nowhere = replace(corpus, sources=(Source(str(tmp_path / "gone")),))
    actor = start_feeder(nowhere, sequences_per_step=1)
    with pytest.raises(StorageError, match="gone: does not exist"):
        ray.get(actor.open.remote())
    ray.kill(actor)


def test_a_bucket_gives_what_the_folder_gives(
    corpus: CorpusSpec, corpus_folder: Path, s3_bucket: str, s3_endpoint: str
) -> None:
    label = Source(str(corpus_folder)).label
    remote = Source(f"{s3_bucket}/deep/{label}", endpoint_url=s3_endpoint)
    remote.storage(remote.path).upload_folder(corpus_folder)
    here = Feeder(corpus, sequences_per_step=PER_STEP)
    there = Feeder(replace(corpus, sources=(remote,)), sequences_per_step=PER_STEP, reading=ON_RAY)
    for step in range(8):
        for name, array in here.batch(step).items():
            np.testing.assert_array_equal(there.batch(step)[name], array)
    assert here.state(7)["digest"] == there.state(7)["digest"]
    here.close()
    there.close()
