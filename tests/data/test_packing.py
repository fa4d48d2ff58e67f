"""Packing is exact: every token once, in order, with its document's borders."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from bitdistill_ray.data.packing import PADDING, PackedSequence, Run, pack

PAD = 0


def run_of(tokens: list[int], *, opens: bool = True, whole: bool = False) -> Run:
    ids_R = np.array(tokens, dtype=np.int32)
    return Run(ids_R, np.ones(len(tokens), dtype=np.bool_), opens=opens, whole=whole)


def kept(sequences: list[PackedSequence]) -> list[int]:
    return [token for s in sequences for token in s.ids_T[s.segment_T != PADDING].tolist()]


def test_a_small_case_by_hand() -> None:
    first, second = pack([run_of([1, 2, 3]), run_of([4, 5, 6, 7])], 5, pad_id=PAD)
    assert first.ids_T.tolist() == [1, 2, 3, 4, 5]
    assert first.segment_T.tolist() == [0, 0, 0, 1, 1]
    assert first.target_T.tolist() == [False, True, True, False, True]
    assert second.ids_T.tolist() == [6, 7, PAD, PAD, PAD]
    assert second.segment_T.tolist() == [0, 0, PADDING, PADDING, PADDING]
    assert second.target_T.tolist() == [False, True, False, False, False]


def test_an_example_stays_whole_where_it_fits() -> None:
    packed = list(pack([run_of([1, 2, 3], whole=True), run_of([4, 5, 6], whole=True)], 5, pad_id=PAD))
    assert [s.ids_T.tolist() for s in packed] == [[1, 2, 3, PAD, PAD], [4, 5, 6, PAD, PAD]]
    packed = list(pack([run_of([1, 2], whole=True), run_of([4, 5, 6], whole=True)], 5, pad_id=PAD))
    assert [s.segment_T.tolist() for s in packed] == [[0, 0, 1, 1, 1]]


def test_a_prompt_is_no_target() -> None:
    run = Run(np.array([1, 2, 3, 4], dtype=np.int32), np.array([False, False, True, True]), whole=True)
    (packed,) = pack([run], 6, pad_id=PAD)
    assert packed.target_T.tolist() == [False, False, True, True, False, False]


@given(
    documents=st.lists(st.lists(st.integers(1, 99), max_size=30), max_size=12),
    length=st.integers(2, 9),
)
def test_every_token_once_and_in_order(documents: list[list[int]], length: int) -> None:
    sequences = list(pack([run_of(tokens) for tokens in documents], length, pad_id=PAD))
    assert kept(sequences) == [token for tokens in documents for token in tokens]
    assert all(len(s.ids_T) == len(s.target_T) == len(s.segment_T) == length for s in sequences)
    assert all((s.segment_T != PADDING).all() for s in sequences[:-1]), "only the last one is padded"
    for s in sequences:
        used = s.segment_T[s.segment_T != PADDING]
        assert used[0] == 0
        assert set(np.diff(used).tolist()) <= {0, 1}
        starts = np.flatnonzero(np.diff(s.segment_T, prepend=PADDING - 1) != 0)
        expected = s.segment_T != PADDING
        expected[starts] = False
        assert s.target_T.tolist() == expected.tolist()


@given(
    documents=st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=30), max_size=8),
    length=st.integers(2, 9),
    size=st.integers(1, 7),
)
def test_the_pieces_of_a_document_pack_like_the_document(documents: list[list[int]], length: int, size: int) -> None:
    whole = pack([run_of(tokens) for tokens in documents], length, pad_id=PAD)
    pieces = pack(
        [run_of(tokens[i : i + size], opens=i == 0) for tokens in documents for i in range(0, len(tokens), size)],
        length,
        pad_id=PAD,
    )
    for one, other in zip(whole, pieces, strict=True):
        np.testing.assert_array_equal(one.ids_T, other.ids_T)
        np.testing.assert_array_equal(one.target_T, other.target_T)
        np.testing.assert_array_equal(one.segment_T, other.segment_T)


@given(lengths=st.lists(st.integers(1, 8), max_size=12))
def test_whole_examples_never_straddle(lengths: list[int]) -> None:
    runs = [run_of([number + 1] * size, whole=True) for number, size in enumerate(lengths)]
    sequences = list(pack(runs, 8, pad_id=PAD))
    for number, size in enumerate(lengths):
        assert sorted(int((s.ids_T == number + 1).sum()) for s in sequences)[-1] == size
    assert kept(sequences) == [number + 1 for number, size in enumerate(lengths) for _ in range(size)]
