"""A live teacher behind the cache: asked once about every sequence, whatever the batch, payload and coding."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bitdistill_ray.cache.block import BLOCK
from bitdistill_ray.cache.client import CachedTeacher, open_cache
from bitdistill_ray.config import CacheConfig, Dtype, StorageConfig, TeacherConfig
from bitdistill_ray.core import Coding, Payload, TeacherSignals, TokenBatch
from bitdistill_ray.teacher import wire
from bitdistill_ray.teacher.client import TeacherClient
from bitdistill_ray.teacher.pool import TeacherPool
from bitdistill_ray.teacher.request import SignalRequest
from tests.teacher.test_wire import same_bits, tensors
from tests.tiny_models import packed_batch, save_tiny

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TIMEOUT_S = 300.0
BATCHES = [packed_batch([[7, 6], [12], [16]], 16, seed=seed) for seed in range(3)]
ROWS = 3 * len(BATCHES)
REQUESTS = {
    "hidden+qkv": SignalRequest(attention_layer=1),
    "hidden+states": SignalRequest(states_layers=(0, 1)),
    "topk": SignalRequest(payload=Payload.TOPK, topk=9),
    "sampled": SignalRequest(payload=Payload.SAMPLED, samples=5),
}


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Iterator[TeacherPool]:
    source = save_tiny(tmp_path_factory.mktemp("teacher"), "llama")
    started = TeacherPool.start(str(source), TeacherConfig(cpus=0.5, threads=1, dtype=Dtype.FP32, timeout_s=TIMEOUT_S))
    yield started
    started.shutdown()


def cached(pool: TeacherPool, folder: Any, request: SignalRequest, *, coding: Coding = Coding.LOSSLESS,
           say: Any = print) -> CachedTeacher:  # fmt: skip
    client = TeacherClient(pool.handles, request, timeout_s=TIMEOUT_S, attempts=1)
    cache = CacheConfig(folder=str(folder), coding=coding, block_sequences=4)
    teacher = TeacherConfig(payload=request.payload, topk=request.topk, timeout_s=TIMEOUT_S, cache=cache)
    return open_cache(client, teacher, StorageConfig(), pool.identity, say=say)


def ask_all(teacher: CachedTeacher, batches: list[TokenBatch]) -> tuple[list[TeacherSignals], dict[str, float]]:
    """All answers, two questions in flight, and the counters."""
    arrays = [wire.encode_batch(batch) for batch in batches]
    tickets = [teacher.ask(question) for question in arrays[:2]]
    answers = []
    for place, question in enumerate(arrays):
        answers.append(teacher.answer(tickets[place], question))
        if place + 2 < len(arrays):
            tickets.append(teacher.ask(arrays[place + 2]))
    counters = teacher.take_counters()
    teacher.finish()
    return answers, counters


def equal(a: TeacherSignals, b: TeacherSignals) -> bool:
    mine, other = tensors_of(a), tensors_of(b)
    return a.sequence_ids == b.sequence_ids and mine.keys() == other.keys() and all(
        same_bits(mine[name], other[name]) for name in mine
    )  # fmt: skip


def tensors_of(signals: TeacherSignals) -> dict[str, Tensor]:
    drawn = {} if signals.sampled is None else {"ids": signals.sampled.ids_BTS, "lp": signals.sampled.logprobs_BTS}
    return {**tensors(signals), **drawn}


@pytest.mark.parametrize("kind", list(REQUESTS))
def test_the_teacher_is_asked_once_and_the_answers_are_the_live_ones_bit_for_bit(
    kind: str, pool: TeacherPool, tmp_path: Path
) -> None:
    request = REQUESTS[kind]
    client = TeacherClient(pool.handles, request, timeout_s=TIMEOUT_S, attempts=1)
    live = [client.answer(client.ask(a), a) for a in map(wire.encode_batch, BATCHES)]
    first, counters = ask_all(cached(pool, tmp_path, request), BATCHES)
    assert (counters["cache_hits"], counters["cache_misses"]) == (0, ROWS)
    assert counters["teacher_bytes"] == client.take_counters()["teacher_bytes"] > 0
    second, counters = ask_all(cached(pool, tmp_path, request), BATCHES)
    assert (counters["cache_hits"], counters["cache_misses"]) == (ROWS, 0)
    assert counters["teacher_bytes"] == counters["retries"] == counters["teacher_wait_s"] == 0
    assert all(equal(a, b) and equal(a, c) for a, b, c in zip(live, first, second, strict=True))


def test_sequences_are_found_in_other_batches(pool: TeacherPool, tmp_path: Path) -> None:
    ask_all(cached(pool, tmp_path, REQUESTS["topk"]), BATCHES)
    whole = [getattr(batch, name) for name in ("ids_BT", "target_BT", "segment_BT") for batch in BATCHES]
    ids, target, segment = (torch.cat(whole[i : i + 3])[[7, 0, 4, 2, 8]] for i in (0, 3, 6))
    mixed = TokenBatch(ids_BT=ids, target_BT=target, segment_BT=segment, sequence_ids=tuple("abcde"))
    [found], counters = ask_all(cached(pool, tmp_path, REQUESTS["topk"]), [mixed])
    assert counters["cache_hits"] == 5
    assert counters["teacher_bytes"] == 0
    assert found.sequence_ids == tuple("abcde")


def test_a_run_that_fills_a_compact_cache_hears_what_those_that_read_it_hear(pool: TeacherPool, tmp_path: Path) -> None:
    request = REQUESTS["topk"]
    first, _ = ask_all(cached(pool, tmp_path, request, coding=Coding.COMPACT), BATCHES)
    second, counters = ask_all(cached(pool, tmp_path, request, coding=Coding.COMPACT), BATCHES)
    assert counters["cache_misses"] == 0
    assert all(equal(a, b) for a, b in zip(first, second, strict=True))
    _, counters = ask_all(cached(pool, tmp_path, request), BATCHES[:1])
    assert counters["cache_misses"] == 3, "lossless answers are another space"


def test_a_damaged_block_is_named_asked_again_and_written_again(pool: TeacherPool, tmp_path: Path) -> None:
    request = REQUESTS["topk"]
    first, _ = ask_all(cached(pool, tmp_path, request), BATCHES)
    blocks = sorted(tmp_path.rglob(f"*{BLOCK}"))
    raw = bytearray(blocks[0].read_bytes())
    raw[len(raw) // 3] ^= 1
    blocks[0].write_bytes(raw)
    blocks[1].write_bytes(blocks[1].read_bytes()[:-9])
    said: list[str] = []
    second, counters = ask_all(cached(pool, tmp_path, request, say=said.append), BATCHES)
    assert counters["cache_misses"] >= 6
    assert all(equal(a, b) for a, b in zip(first, second, strict=True))
    assert len(said) == 2
    assert any(str(blocks[0]) in line and "fails its checksum" in line for line in said)
    assert any(str(blocks[1]) in line and " bytes of " in line for line in said)
    third, counters = ask_all(cached(pool, tmp_path, request, say=said.append), BATCHES)
    assert counters["cache_misses"] == counters["teacher_bytes"] == 0
    assert len(said) == 2
    assert all(equal(a, b) for a, b in zip(first, third, strict=True))


def test_a_cache_that_cannot_be_written_costs_its_entries_and_not_the_answers(
    pool: TeacherPool, tmp_path: Path
) -> None:
    (tmp_path / "cache").mkdir()
    said: list[str] = []
    teacher = cached(pool, tmp_path / "cache", REQUESTS["topk"], say=said.append)
    (tmp_path / "cache" / teacher.store.space).write_text("a file where the space's folder belongs")
    answers, _ = ask_all(teacher, BATCHES)
    assert len(answers) == len(BATCHES)
    assert said
    assert all("were not written, the run goes on without them" in line for line in said)
