"""Top-k answers as records: the ids are a set, the values stay or nearly stay, and the bytes are what was promised."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitdistill_ray.bench.cache import heavy_tailed
from bitdistill_ray.cache.fields import from_bits, join, split, to_bits
from bitdistill_ray.cache.idset import IdSet
from bitdistill_ray.cache.topk import TopKCoder, likeliest_first
from bitdistill_ray.core import Coding
from bitdistill_ray.errors import DataError
from tests.cache.answers import QWEN3_VOCABULARY, losses, topk_of
from tests.tiny_models import VOCAB_SIZE, packed_batch, tiny_model

pytestmark = pytest.mark.slow  # eight seconds of arithmetic

MOST_BYTES = {(Coding.COMPACT, 128): 300, (Coding.COMPACT, 50): 120, (Coding.LOSSLESS, 128): 560}


@given(st.data(), st.integers(1, 20), st.integers(0, 9), st.integers(1, 7))
def test_fields_come_back(data: st.DataObject, width: int, records: int, count: int) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    first = rng.integers(0, 2**width, (records, count))
    second = rng.integers(0, 2**3, (records, 2 * count))
    joined = join([to_bits(first, width), to_bits(second, 3)])
    assert joined.shape == (records, -(-(count * width + 6 * count) // 8))
    a, b = split(joined, (count * width, 6 * count))
    assert np.array_equal(from_bits(a, width), first)
    assert np.array_equal(from_bits(b, 3), second)


@st.composite
def id_sets(draw: st.DrawFn) -> tuple[int, np.ndarray]:
    """(vocabulary, rising ids [n, S]): evenly spread, crowded at one end, or all there are."""
    vocabulary = draw(st.sampled_from([1, 2, 31, 320, 4096, 49_152, QWEN3_VOCABULARY]))
    entries = draw(st.integers(1, min(vocabulary, 140)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    last = draw(st.integers(entries, vocabulary))  # ids below it
    rows = [rng.choice(last, entries, replace=False) for _ in range(draw(st.integers(1, 4)))]
    ids_nS = np.sort(np.stack(rows), axis=1)
    return vocabulary, (vocabulary - 1 - ids_nS)[:, ::-1] if draw(st.booleans()) else ids_nS


@given(id_sets())
@settings(deadline=None)
def test_any_set_of_ids_comes_back(drawn: tuple[int, np.ndarray]) -> None:
    vocabulary, ids_nS = drawn
    coder = IdSet(vocabulary=vocabulary, entries=ids_nS.shape[1])
    lows, highs = coder.encode(ids_nS)
    assert (lows.shape[1], highs.shape[1]) == coder.sizes
    assert np.array_equal(coder.decode(lows, highs), ids_nS)


@pytest.mark.parametrize("ids", [[3, 3, 5], [5, 4, 9], [-1, 2, 3], [1, 2, 10]])
def test_ids_that_are_no_set_are_refused(ids: list[int]) -> None:
    with pytest.raises(DataError, match="3 different ones below 10"):
        IdSet(vocabulary=10, entries=3).encode(np.array([ids]))


def test_a_record_that_is_no_code_is_refused() -> None:
    coder = IdSet(vocabulary=100, entries=5)
    lows, highs = coder.encode(np.array([[1, 20, 40, 60, 99]]))
    highs[0, highs[0].argmax()] = 0
    with pytest.raises(DataError, match="a record that does not hold 5 ids"):
        coder.decode(lows, highs)


@given(id_sets(), st.floats(0.0, 40.0), st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_lossless_keeps_every_bit_of_fp16(drawn: tuple[int, np.ndarray], spread: float, seed: int) -> None:
    vocabulary, ids_nS = drawn
    rng = np.random.default_rng(seed)
    values_nS = -(np.abs(rng.normal(0, spread, ids_nS.shape))).astype(np.float16)  # ties and minus zero among them
    values_nS[0, 0] = [-0.0, -np.inf, np.nan][seed % 3]
    coder = TopKCoder(coding=Coding.LOSSLESS, vocabulary=vocabulary, entries=ids_nS.shape[1])
    shuffled = rng.permuted(np.arange(ids_nS.shape[1])[None].repeat(len(ids_nS), 0), axis=1)
    records = coder.encode(*(np.take_along_axis(a, shuffled, axis=1) for a in (ids_nS, values_nS)))
    assert records.shape == (len(ids_nS), coder.token_bytes)
    found_ids, found_values = coder.decode(records)
    expected_ids, expected_values = likeliest_first(ids_nS, values_nS)
    assert np.array_equal(found_ids, expected_ids)
    assert found_values.tobytes() == expected_values.tobytes()


@given(id_sets(), st.floats(0.0, 40.0), st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_compact_is_a_distribution_over_the_same_ids(drawn: tuple[int, np.ndarray], spread: float, seed: int) -> None:
    """Whatever the shape: the ids, the head's whole mass, and every value to within its cell."""
    vocabulary, ids_nS = drawn
    rng = np.random.default_rng(seed)
    logits_nS = rng.normal(0, spread, ids_nS.shape)
    head = rng.uniform(0.2, 0.999)
    log_nS = torch.from_numpy(logits_nS).log_softmax(-1).numpy() + np.log(head)
    coder = TopKCoder(coding=Coding.COMPACT, vocabulary=vocabulary, entries=ids_nS.shape[1])
    found_ids, found = coder.decode(coder.encode(ids_nS, log_nS))
    assert np.array_equal(np.sort(found_ids, axis=1), ids_nS)
    assert (np.diff(found, axis=1) <= 0).all()
    np.testing.assert_allclose(np.exp(found).sum(axis=1), head, rtol=3e-3)
    order = np.argsort(found_ids, axis=1)
    cell = (min(log_nS.max() - log_nS.min(), 31.875) + 0.25) / 15
    deep = log_nS < log_nS.max(axis=1, keepdims=True) - 31.5
    error = np.abs(np.take_along_axis(found, order, axis=1) - log_nS)
    assert (error[~deep] < cell + 0.05).all()


def test_padding_that_is_not_a_number_costs_nothing() -> None:
    ids = np.arange(6)[None].repeat(2, 0)
    values = np.log(np.array([[0.4, 0.3, 0.1, 0.05, 0.05, 0.05], [np.nan] * 6]))
    _, found = TopKCoder(coding=Coding.COMPACT, vocabulary=50, entries=6).decode(
        TopKCoder(coding=Coding.COMPACT, vocabulary=50, entries=6).encode(ids, values)
    )
    assert np.isfinite(found).all()


@pytest.mark.parametrize(("coding", "entries"), list(MOST_BYTES))
def test_the_bytes_of_a_token(coding: Coding, entries: int) -> None:
    coder = TopKCoder(coding=coding, vocabulary=QWEN3_VOCABULARY, entries=entries)
    ids_nS, logprobs_nS = topk_of(logits_of("heavy tail"), entries)
    records = coder.encode(ids_nS, logprobs_nS.astype(np.float16))
    assert records.nbytes / len(ids_nS) == coder.token_bytes <= MOST_BYTES[coding, entries]


@cache
def logits_of(case: str) -> Tensor:
    """fp32 logits [n, V] of a heavy tail, or of a tiny model of that family."""
    if case == "heavy tail":
        return heavy_tailed(64, QWEN3_VOCABULARY)
    batch = packed_batch([[40, 24], [64]], 64)
    with torch.no_grad():
        return tiny_model(case)(input_ids=batch.ids_BT).logits.flatten(0, 1).float()


@pytest.mark.parametrize("entries", [50, 128])
@pytest.mark.parametrize("coding", list(Coding))
@pytest.mark.parametrize("noise", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("case", ["heavy tail", "llama-untied", "qwen3", "gemma3"])
def test_the_loss_is_that_of_the_uncompressed_answers(case: str, noise: float, coding: Coding, entries: int) -> None:
    """Students near the teacher and far from it: both KLs within 0.5 %, and the gradient's direction too.

    In 119 bytes, compact at S = 50, noise of 2e-4 nats stays, which shows beside the KL of 0.02 of a student that is
    as good as the teacher.
    """
    teacher_nV = logits_of(case)
    student_nV = teacher_nV + noise * torch.randn(teacher_nV.shape, generator=torch.Generator().manual_seed(7))
    ids_nS, logprobs_nS = topk_of(teacher_nV, entries)
    coder = TopKCoder(coding=coding, vocabulary=teacher_nV.shape[1], entries=entries)
    decoded = coder.decode(coder.encode(ids_nS, logprobs_nS.astype(np.float16)))
    exact, found = losses(student_nV, ids_nS, logprobs_nS), losses(student_nV, *decoded)
    nats = 2e-4 if (coding, entries) == (Coding.COMPACT, 50) else 0.0
    assert abs(found.forward - exact.forward) <= 0.005 * exact.forward + nats
    assert abs(found.reverse - exact.reverse) <= 0.005 * exact.reverse + nats
    cosine = torch.cosine_similarity(found.gradient.flatten(), exact.gradient.flatten(), dim=0)
    assert cosine > 0.98


def test_the_vocabulary_of_the_tiny_models_is_wider_than_an_answer() -> None:
    assert VOCAB_SIZE > 128
