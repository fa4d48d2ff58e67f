"""The store: what is written is found by whoever opens it next; what is damaged is found out, named and forgotten."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bitdistill_ray.cache.block import BLOCK, INDEX
from bitdistill_ray.cache.entry import Entry, entries_of, keys_of, message_of
from bitdistill_ray.cache.store import CacheStore
from bitdistill_ray.cache.topk import TopKCoder
from bitdistill_ray.core import Coding
from bitdistill_ray.errors import StorageError
from bitdistill_ray.storage import Storage

ABOUT = {"teacher": {"weights": "abc"}, "payload": "topk"}


def entry(seed: int) -> Entry:
    rng = np.random.default_rng(seed)
    return {
        "hidden": rng.normal(size=(4, 3)).astype(np.float16),
        "q:bf16": rng.integers(-9, 9, (2, 4, 1), dtype=np.int16),
        "attention_layer": np.array(1),
    }


def entries(*seeds: int) -> dict[str, Entry]:
    return {f"key{seed}": entry(seed) for seed in seeds}


def opened(folder: Path | Storage, said: list[str] | None = None, *, memory: int = 1 << 20) -> CacheStore:
    storage = folder if isinstance(folder, Storage) else Storage(folder)
    store = CacheStore(storage, ABOUT, memory_bytes=memory, say=[].append if said is None else said.append)
    store.open()
    return store


def same(found: Entry | None, seed: int) -> bool:
    expected = entry(seed)
    return found is not None and found.keys() == expected.keys() and all(
        found[name].dtype == expected[name].dtype and np.array_equal(found[name], expected[name]) for name in expected
    )  # fmt: skip


def files(store: CacheStore, suffix: str) -> list[Path]:
    return sorted((Path(store.storage.url) / "blocks").rglob(f"*{suffix}"))


def test_entries_are_found_by_whoever_opens_the_space_next(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.put(entries(1, 2))
    store.put(entries(3))
    for reader in (store, opened(tmp_path)):
        assert len(reader) == 3
        assert all(same(reader.get(f"key{seed}"), seed) for seed in (1, 2, 3))
        assert reader.get("key4") is None


def test_another_teacher_payload_or_coding_is_another_space(tmp_path: Path) -> None:
    opened(tmp_path).put(entries(1))
    other = CacheStore(Storage(tmp_path), {**ABOUT, "payload": "hidden"}, memory_bytes=1)
    other.open()
    assert len(other) == 0
    assert other.get("key1") is None


def test_it_lives_in_object_storage_too(s3_bucket: str, s3_endpoint: str) -> None:
    folder = Storage(f"{s3_bucket}/cache", endpoint_url=s3_endpoint)
    opened(folder).put(entries(1, 2))
    assert same(opened(folder).get("key2"), 2)


def test_no_bucket_is_said_when_it_is_opened(s3_endpoint: str) -> None:
    with pytest.raises(StorageError, match="no such bucket"):
        opened(Storage("s3://no-such-bucket-here/cache", endpoint_url=s3_endpoint))


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0x10
    path.write_bytes(raw)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
@pytest.mark.parametrize("suffix", [BLOCK, INDEX])
def test_a_damaged_block_is_named_forgotten_and_written_again(tmp_path: Path, damage, suffix: str) -> None:  # type: ignore[no-untyped-def]
    opened(tmp_path).put(entries(1, 2))
    opened(tmp_path).put(entries(3))
    [victim] = [file for file in files(opened(tmp_path), suffix) if opened(tmp_path)._block_of["key1"] in file.name]
    damage(victim)
    said: list[str] = []
    store = opened(tmp_path, said)
    assert store.get("key1") is None
    assert store.get("key2") is None
    assert same(store.get("key3"), 3)
    if not (damage is Path.unlink and suffix == INDEX):  # a block without an index was never finished: nothing to say
        [line] = said
        assert victim.stem in line
        assert ("2 sequences" in line) == (suffix == BLOCK)
    store.put(entries(1, 2))
    again = opened(tmp_path, said)
    assert all(same(again.get(f"key{seed}"), seed) for seed in (1, 2, 3))
    assert len(said) <= 1


def test_a_block_whose_writer_died_before_the_index_is_none(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.put(entries(1))
    files(store, INDEX)[0].unlink()
    assert opened(tmp_path).get("key1") is None


def test_memory_is_bounded_and_forgotten_blocks_are_read_again(tmp_path: Path) -> None:
    store = opened(tmp_path, memory=1)
    for seed in range(4):
        store.put(entries(seed))
    for seed in (0, 1, 2, 3, 0, 2):
        assert same(store.get(f"key{seed}"), seed)
        assert len(store._held) == 1


def test_keys_tell_ids_and_document_boundaries_apart_and_nothing_else() -> None:
    ids, segment = np.array([[1, 2, 3], [1, 2, 3], [1, 2, 4]]), np.array([[0, 0, 0], [0, 0, 1], [0, 0, 0]])
    keys = keys_of({"ids": ids, "segment": segment})
    assert len(set(keys)) == 3
    assert keys_of({"ids": ids[::-1].astype(np.int32), "segment": segment[::-1]}) == keys[::-1]


@pytest.mark.parametrize("coding", list(Coding))
def test_an_answer_is_cut_into_sequences_and_put_together_in_another_order(coding: Coding) -> None:
    rng = np.random.default_rng(0)
    ids = np.stack([rng.choice(50, 5, replace=False) for _ in range(12)]).astype(np.int32).reshape(3, 4, 5)
    values = np.sort(np.log(rng.dirichlet(np.ones(6), 12)[:, :5]), axis=1)[:, ::-1].astype(np.float16).reshape(3, 4, 5)
    q = rng.normal(size=(3, 2, 4, 2)).astype(np.float32)
    message = {"sequence_ids": ("a", "b", "c"), "topk_ids": ids, "topk_logprobs": values, "attention_layer": 1, "q": q}
    coder = TopKCoder(coding=coding, vocabulary=50, entries=5)
    parts = entries_of({**message, "digest": "of the question"}, coder)
    turned = message_of([parts[2], parts[0]], coder, ("c", "a"))
    assert turned["sequence_ids"] == ("c", "a")
    assert turned["attention_layer"] == 1
    assert np.array_equal(turned["q"], q[[2, 0]])
    assert np.array_equal(np.sort(turned["topk_ids"]), np.sort(ids[[2, 0]]))
    if coding is Coding.LOSSLESS:
        assert np.array_equal(turned["topk_ids"], ids[[2, 0]])
        assert turned["topk_logprobs"].tobytes() == values[[2, 0]].tobytes()
