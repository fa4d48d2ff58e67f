"""A weighted mixture: even shares, a pass count per source, and the same order however it is read or interrupted."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bitdistill_ray.data.batch import BatchArrays
from bitdistill_ray.data.dataset import RayReading, divide
from bitdistill_ray.data.feeder import Feeder, start_feeder
from bitdistill_ray.data.mixture import Draw
from bitdistill_ray.data.sources import CorpusSpec, Source
from bitdistill_ray.errors import ConfigError, DataError
from tests.data.conftest import documents, to_jsonl, write_parquet

PER_STEP = 6
STEPS = 30


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path, corpus_folder: Path) -> CorpusSpec:
    """Three sources of very different sizes, the smallest with half of the weight."""
    folder = tmp_path_factory.mktemp("mixture")
    (folder / "small.jsonl").write_bytes(to_jsonl(documents(2, 21)))
    write_parquet(folder / "large.parquet", documents(160, 22), row_group_size=20)
    sources = (
        Source(str(folder / "small.jsonl"), name="small", weight=5),
        Source(str(folder / "large.parquet"), name="large", weight=3),
        Source(str(corpus_folder), name="files", weight=2),
    )
    return CorpusSpec(sources=sources, tokenizer=str(tokenizer_folder), sequence_length=48, seed=3, window=16)


def ids(arrays: BatchArrays) -> list[str]:
    return [str(identity) for identity in arrays["sequence_ids"]]


def state(feeder: Feeder, step: int) -> dict[str, Any]:
    return dict(json.loads(json.dumps(feeder.state(step))))


@pytest.fixture(scope="module")
def whole(mixed: CorpusSpec) -> list[tuple[BatchArrays, dict[str, Any]]]:
    """The run that nothing interrupts."""
    feeder = Feeder(mixed, sequences_per_step=PER_STEP)
    made = [(feeder.batch(step), state(feeder, step)) for step in range(STEPS)]
    feeder.close()
    return made


def test_sources_get_their_weight_and_passes_of_their_own(whole: list[tuple[BatchArrays, dict[str, Any]]]) -> None:
    order = [identity for arrays, _ in whole for identity in ids(arrays)]
    for length in (10, 50, len(order)):
        seen = Counter(identity.split("#")[0] for identity in order[:length])
        for name, share in (("small", 0.5), ("large", 0.3), ("files", 0.2)):
            assert abs(seen[name] - share * length) <= 3
    times = Counter(order)
    assert max(times.values()) > 5, "the small source begins again"
    assert all(count == 1 for identity, count in times.items() if identity.startswith("large#"))
    cursors = whole[-1][1]["cursors"]
    assert cursors.keys() == {"small", "large", "files"}
    assert cursors["small"]["epoch"] > 5
    assert cursors["large"]["epoch"] == 0


def test_a_source_in_a_mixture_has_the_order_it_has_alone(
    mixed: CorpusSpec, whole: list[tuple[BatchArrays, dict[str, Any]]]
) -> None:
    order = [identity for arrays, _ in whole for identity in ids(arrays)]
    for source in mixed.sources:
        feeder = Feeder(replace(mixed, sources=(replace(source, weight=None),)), sequences_per_step=1)
        own = [identity for identity in order if identity.startswith(f"{source.label}#")]
        assert [ids(feeder.batch(step))[0] for step in range(len(own))] == own
        feeder.close()


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(0, STEPS - 1), max_size=4, unique=True).map(sorted), ranks=st.sampled_from([1, 2, 3]))
def test_interrupted_anywhere_and_resumed_is_uninterrupted(
    mixed: CorpusSpec, whole: list[tuple[BatchArrays, dict[str, Any]]], cuts: list[int], ranks: int
) -> None:
    """Kills after any steps, with other numbers of ranks after each: the same sequences, bytes and ledgers."""
    ledger: dict[str, Any] | None = None
    first = 0
    for part, cut in enumerate([*cuts, STEPS - 1]):
        feeder = Feeder(mixed, sequences_per_step=PER_STEP, ledger=ledger, prefetch_steps=part)
        among = (ranks + part - 1) % 3 + 1
        for step in range(first, cut + 1):
            shares = [feeder.batch(step, rank=rank, ranks=among) for rank in range(among)]
            for name, array in whole[step][0].items():
                np.testing.assert_array_equal(np.concatenate([share[name] for share in shares]), array)
            ledger = state(feeder, step)
            assert ledger == whole[step][1]
        feeder.close()
        first = cut + 1


@given(
    weights=st.lists(st.integers(1, 1000), min_size=1, max_size=8),
    seed=st.integers(0, 2**40),
    start=st.integers(0, 10**12),
)
def test_shares_are_even_wherever_one_looks(weights: list[int], seed: int, start: int) -> None:
    shares = [Fraction(weight, sum(weights)) for weight in weights]
    draw = Draw(shares, seed)
    drawn = Counter(draw(start + n) for n in range(400))
    assert set(drawn) <= set(range(len(shares)))
    for index, share in enumerate(shares):
        assert abs(drawn[index] - float(400 * share)) <= 6


def test_the_ledger_refuses_other_weights(
    mixed: CorpusSpec, whole: list[tuple[BatchArrays, dict[str, Any]]], tmp_path: Path
) -> None:
    def resumed(weights: list[float | None]) -> None:
        sources = tuple(replace(s, weight=w) for s, w in zip(mixed.sources, weights, strict=True))
        feeder = Feeder(replace(mixed, sources=sources), sequences_per_step=PER_STEP, ledger=whole[3][1])
        try:
            assert ids(feeder.batch(4)) == ids(whole[4][0])
        finally:
            feeder.close()

    resumed([50, 30, 20])  # the same shares
    for other in ([5, 3, 1], [None, None, None]):
        with pytest.raises(DataError, match="the weights of the sources changed since"):
            resumed(other)
    with pytest.raises(ConfigError, match="some sources have a weight and some have none"):
        resumed([5, None, 1])
    with pytest.raises(ConfigError, match="a weight of 0"):
        resumed([5, 0, 1])
    write_parquet(tmp_path / "empty.parquet", ["", None], row_group_size=1)
    empty = (*mixed.sources, Source(str(tmp_path), name="empty", weight=1))
    feeder = Feeder(replace(mixed, sources=empty), sequences_per_step=64)
    with pytest.raises(DataError, match=f"{tmp_path.name}.*an empty corpus"):
        feeder.batch(0)
    feeder.close()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_on_ray_the_mixture_is_the_same(
    mixed: CorpusSpec, whole: list[tuple[BatchArrays, dict[str, Any]]], ray_session: None
) -> None:
    """With more sources than readers at a time, and killed on the way."""
    actor = start_feeder(mixed, sequences_per_step=PER_STEP, reading=RayReading(concurrency=2))
    for step in range(5):
        parts = [ray.get(actor.batch.remote(step, rank=rank, ranks=2)) for rank in range(2)]
        np.testing.assert_array_equal(np.concatenate([part["ids"] for part in parts]), whole[step][0]["ids"])
    assert ray.get(actor.state.remote(4)) == whole[4][1]
    ray.kill(actor)
    resumed = start_feeder(mixed, sequences_per_step=PER_STEP, ledger=whole[4][1])
    for step in (5, STEPS - 1):
        assert ids(ray.get(resumed.batch.remote(step))) == ids(whole[step][0])
        assert ray.get(resumed.state.remote(step)) == whole[step][1]
    ray.kill(resumed)


@given(
    weights=st.lists(st.integers(1, 100), min_size=2, max_size=8),
    free=st.floats(1, 200),
    concurrency=st.none() | st.integers(1, 64),
)
def test_readers_of_all_streams_fit_side_by_side(weights: list[int], free: float, concurrency: int | None) -> None:
    shares = [Fraction(weight, sum(weights)) for weight in weights]
    parts = divide(RayReading(concurrency=concurrency), shares, free=free)
    units = [part.concurrency or 0 for part in parts]
    assert min(units) >= 1
    assert sum(units) <= max(len(parts), concurrency or 0, free) + len(parts)
    assert sum(part.cpus * (part.concurrency or 0) for part in parts) <= free
    assert sum(part.store for part in parts) <= 1 + 1e-9
    assert divide(RayReading(concurrency=concurrency), [Fraction(1)], free=free) == [
        RayReading(concurrency=concurrency)
    ]
