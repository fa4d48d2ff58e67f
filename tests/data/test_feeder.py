"""The feeder's promise: a run that is killed and resumed sees the same sequences as one that is not.

Everything here reads in this process; `test_on_ray.py` holds the cluster to the same results.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitdistill_ray.data import blocks
from bitdistill_ray.data.batch import BatchArrays, token_batch
from bitdistill_ray.data.documents import Counts, Pair, Piece, read_documents
from bitdistill_ray.data.encoder import Encoder, load_encoder
from bitdistill_ray.data.feeder import Feeder
from bitdistill_ray.data.ledger import Cursor
from bitdistill_ray.data.mixture import STREAM
from bitdistill_ray.data.shuffle import unit_order
from bitdistill_ray.data.sources import CorpusSpec, Source
from bitdistill_ray.data.units import Unit, list_units
from bitdistill_ray.errors import ConfigError, DataError, ModelError
from tests.data.conftest import documents, to_jsonl, write_parquet
from tests.tiny_models import tiny_tokenizer

PER_STEP = 6


@pytest.fixture
def corpus(corpus_folder: Path, tokenizer_folder: Path) -> CorpusSpec:
    return CorpusSpec(
        sources=(Source(str(corpus_folder)),), tokenizer=str(tokenizer_folder), sequence_length=48, seed=3, window=16
    )


def run(corpus: CorpusSpec, steps: range, *, ledger: dict[str, Any] | None = None) -> Iterator[tuple[BatchArrays, Any]]:
    feeder = Feeder(corpus, sequences_per_step=PER_STEP, ledger=ledger)
    for step in steps:
        yield feeder.batch(step), json.loads(json.dumps(feeder.state(step)))
    feeder.close()


def ids(arrays: BatchArrays) -> list[str]:
    return list(token_batch(arrays).sequence_ids)


def same(one: BatchArrays, other: BatchArrays) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def steps_of_a_pass(corpus: CorpusSpec) -> int:
    """The first step after which the first pass is over."""
    for step, (_, state) in enumerate(run(corpus, range(1000))):
        if state["cursors"][STREAM]["epoch"]:
            return step
    raise AssertionError("a pass has no end")


def test_a_pass_holds_every_token_of_every_document_once(
    corpus_folder: Path, corpus: CorpusSpec, encoder: Encoder
) -> None:
    seen: dict[str, list[int]] = {}
    for arrays, state in run(corpus, range(1000)):
        batch = token_batch(arrays)
        for row, identity in enumerate(batch.sequence_ids):
            assert identity not in seen or state["cursors"][STREAM]["epoch"], "twice in one pass"
            tokens = batch.ids_BT[row][batch.segment_BT[row] >= 0].tolist()
            assert seen.setdefault(identity, tokens) == tokens
        if state["cursors"][STREAM]["epoch"]:
            break
    assert {identity.split("#")[0] for identity in seen} == {Source(str(corpus_folder)).label}
    units: dict[str, list[int]] = {}
    for identity in sorted(seen, key=lambda name: int(name.split("#")[2])):
        units.setdefault(identity.split("#")[1], []).extend(seen[identity])
    wanted = {
        "a.parquet@0": documents(20, 1)[:8],
        "a.parquet@1": documents(20, 1)[8:16],
        "a.parquet@2": documents(20, 1)[16:],
        "deep/b%231.parquet@0": documents(5, 2),
        "c.jsonl": documents(12, 3),
        "d.jsonl.gz": documents(9, 4),
        "e.jsonl.zst": documents(9, 5),
        "f.txt": ["\n".join(documents(10, 6))],
        "g.txt.gz": ["\n".join(documents(3, 7))],
    }
    tokenizer = tiny_tokenizer()
    for unit, texts in wanted.items():
        expected = [t for text in texts for t in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
        assert units.pop(unit) == expected
    assert not units


def test_any_kill_and_resume_continues_exactly(corpus: CorpusSpec) -> None:
    last = steps_of_a_pass(corpus) + 4  # well into the second pass
    whole = list(run(corpus, range(last)))
    for cut in range(last):
        resumed = list(run(corpus, range(cut + 1, min(cut + 6, last)), ledger=whole[cut][1]))
        for (arrays, state), (again, after) in zip(whole[cut + 1 : cut + 6], resumed, strict=True):
            assert same(arrays, again), f"resumed after step {cut}"
            assert state == after, f"resumed after step {cut}"


def test_a_step_says_which_sequences_it_consumes(corpus: CorpusSpec) -> None:
    """The same after a resume, and another digest for every other order; ids and count are the batch's."""
    whole = Feeder(corpus, sequences_per_step=PER_STEP)
    said = [whole.sequences(step) for step in range(5)]
    for step, row in enumerate(said):
        found = ids(whole.batch(step))
        assert (row["first_sequence"], row["last_sequence"]) == (found[0], found[-1])
        assert row["sequences"] == (step + 1) * PER_STEP
    resumed = Feeder(corpus, sequences_per_step=PER_STEP, ledger=whole.state(2))
    assert [resumed.sequences(step) for step in (3, 4)] == said[3:]
    shuffled = Feeder(replace(corpus, seed=4), sequences_per_step=PER_STEP)
    digests = [row["sequence_digest"] for row in said] + [
        shuffled.sequences(step)["sequence_digest"] for step in (0, 1)
    ]
    assert len(set(digests)) == len(digests)
    for feeder in (whole, resumed, shuffled):
        feeder.close()


def test_a_run_killed_at_every_step_is_the_same_run(corpus: CorpusSpec) -> None:
    last = steps_of_a_pass(corpus) + 2
    whole = list(run(corpus, range(last)))
    ledger: dict[str, Any] | None = None
    for step in range(last):
        ((arrays, ledger),) = run(corpus, range(step, step + 1), ledger=ledger)
        assert same(arrays, whole[step][0])
    assert ledger == whole[-1][1]


def test_a_resumed_run_opens_no_finished_unit(corpus: CorpusSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = steps_of_a_pass(corpus) * 2 // 3
    *_, (_, state) = run(corpus, range(cut + 1))
    opened: list[str] = []

    def note(unit: Unit, corpus: CorpusSpec, counts: Counts) -> Iterator[Piece | Pair]:
        opened.append(unit.name)
        return read_documents(unit, corpus, counts)

    monkeypatch.setattr(blocks, "read_documents", note)
    list(run(corpus, range(cut + 1, cut + 2), ledger=state))
    units = list_units(corpus)
    place = state["cursors"][STREAM]["unit"]
    assert place > 2, "the corpus is too small for this test"
    order = unit_order(len(units), seed=corpus.seed, epoch=0)
    assert opened[: len(units) - place] == [units[i].name for i in order[place:]][: len(opened)]


def test_small_blocks_change_nothing(corpus: CorpusSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = list(run(corpus, range(12)))
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1)
    for (arrays, state), (again, after) in zip(expected, run(corpus, range(12)), strict=True):
        assert same(arrays, again)
        assert state == after


def test_ranks_and_micro_batches_share_the_same_global_batch(corpus: CorpusSpec) -> None:
    (arrays, _), *_ = run(corpus, range(1))
    feeder = Feeder(corpus, sequences_per_step=PER_STEP)
    for ranks, micros in ((1, 1), (2, 1), (3, 2), (1, 6), (6, 1)):
        parts = [
            feeder.batch(0, rank=rank, ranks=ranks, micro=micro, micros=micros)
            for rank in range(ranks)
            for micro in range(micros)
        ]
        assert same(arrays, {name: np.concatenate([part[name] for part in parts]) for name in arrays})
    with pytest.raises(ConfigError, match="6 sequences do not divide among 4 ranks"):
        feeder.batch(0, rank=0, ranks=4)
    with pytest.raises(ConfigError, match="rank 2 of 2"):
        feeder.batch(0, rank=2, ranks=2)
    feeder.close()


def test_requests_can_be_repeated_and_come_in_any_order(corpus: CorpusSpec) -> None:
    expected = [arrays for arrays, _ in run(corpus, range(9))]
    feeder = Feeder(corpus, sequences_per_step=PER_STEP, keep_steps=6)
    for step in (2, 0, 1, 2, 5, 3, 8, 3):
        assert same(feeder.batch(step), expected[step])
    with pytest.raises(DataError, match="step 2: no longer kept; the feeder is at step 9"):
        feeder.batch(2)
    feeder.close()


def test_resume_of_a_living_feeder(corpus: CorpusSpec) -> None:
    whole = list(run(corpus, range(8)))
    feeder = Feeder(corpus, sequences_per_step=PER_STEP)
    feeder.batch(6)
    assert feeder.resume(whole[2][1]) == whole[2][1]
    assert feeder.state(2) == whole[2][1]
    assert same(feeder.batch(3), whole[3][0])
    with pytest.raises(DataError, match="step 2: no longer kept"):
        feeder.batch(2)
    feeder.close()


def test_the_window_shuffles_across_units_and_passes_differ(corpus: CorpusSpec) -> None:
    corpus = replace(corpus, window=64)
    last = steps_of_a_pass(corpus)
    first: list[str] = []
    second: list[str] = []
    for arrays, _ in run(corpus, range(2 * last + 2)):
        for identity in ids(arrays):
            (first if identity not in first else second).append(identity)
    assert len({identity.split("#")[1] for identity in first[:16]}) > 1
    assert [identity.split("#")[2] for identity in first[:16]] != sorted(i.split("#")[2] for i in first[:16])
    assert second
    assert first[: len(second)] != second
    assert max(Counter(first).values()) == 1


def test_seed_and_window_decide_the_order_but_not_the_sequences(corpus: CorpusSpec) -> None:
    def some(spec: CorpusSpec) -> dict[str, list[int]]:
        return {i: row.tolist() for a, _ in run(spec, range(10)) for i, row in zip(ids(a), a["ids"], strict=True)}

    base = some(corpus)
    for other in (some(replace(corpus, seed=4)), some(replace(corpus, window=5))):
        assert list(other) != list(base)
        assert all(other[identity] == base[identity] for identity in other.keys() & base.keys())


def test_the_ledger_refuses_another_corpus(corpus: CorpusSpec, tmp_path: Path, corpus_folder: Path) -> None:
    copied = tmp_path / corpus_folder.name
    shutil.copytree(corpus_folder, copied)
    here = replace(corpus, sources=(Source(str(copied)),))
    ((_, state),) = run(here, range(1))
    assert list(run(corpus, range(1, 2), ledger=state)), "the same files elsewhere are the same corpus"
    for change, reason in (
        ({"seed": 9}, "the seed or the shuffle window"),
        ({"window": 17}, "the seed or the shuffle window"),
        ({"sequence_length": 32}, "how documents become sequences"),
        ({"end_token": "<|im_end|>"}, "the tokenizer or the end token"),
        ({"sources": (Source(str(copied), text_column="other"),)}, "how documents become sequences"),
    ):
        with pytest.raises(DataError, match=f"cannot go on from step 1: {reason}.* changed since"):
            list(run(replace(here, **change), range(1, 2), ledger=state))
    (copied / "new.txt").write_text("a new file")
    with pytest.raises(DataError, match="the files of the corpus changed since"):
        list(run(here, range(1, 2), ledger=state))


def test_a_damaged_ledger_is_refused(corpus: CorpusSpec) -> None:
    ((_, state),) = run(corpus, range(1))
    for damaged, words in (
        ({**state, "version": 0}, "version 0, not 1"),
        ({**state, "cursors": {STREAM: {"place": 3}}}, "damaged"),
        ({k: v for k, v in state.items() if k != "digest"}, "damaged: KeyError"),
        ({**state, "cursors": {STREAM: {**state["cursors"][STREAM], "taken": 99}}}, "99 sequences taken from a window"),
    ):
        with pytest.raises(DataError, match=words):
            list(run(corpus, range(1, 2), ledger=damaged))


def test_the_digest_tells_orders_apart(corpus: CorpusSpec) -> None:
    *_, (_, one) = run(corpus, range(3))
    *_, (_, other) = run(replace(corpus, seed=8), range(3))
    assert one["position"] == other["position"] == 3 * PER_STEP
    assert one["digest"] != other["digest"]


def test_windows_of_any_size_end_passes_exactly(tmp_path: Path, tokenizer_folder: Path) -> None:
    """Passes of 5 sequences; units without any; windows that end with a unit, with the pass, and within."""
    write_parquet(tmp_path / "a.parquet", ["", "one", "", None, "two three", "four", ""], row_group_size=1)
    (tmp_path / "b.jsonl").write_bytes(to_jsonl(["five", "six"]))
    for window in (1, 2, 3, 4, 5, 6):
        corpus = CorpusSpec(
            sources=(Source(str(tmp_path), name="s"),),
            tokenizer=str(tokenizer_folder),
            sequence_length=4,
            window=window,
        )
        feeder = Feeder(corpus, sequences_per_step=1)
        length = next(step for step in range(99) if feeder.state(step)["cursors"][STREAM]["epoch"]) + 1
        passes = [[str(feeder.batch(e * length + i)["sequence_ids"][0]) for i in range(length)] for e in range(3)]
        assert all(sorted(one) == sorted(set(passes[0])) for one in passes)
        for e in range(3):
            assert Cursor(**feeder.state((e + 1) * length - 1)["cursors"][STREAM]) == Cursor(epoch=e + 1)
        feeder.close()


@pytest.mark.parametrize("per_step", [1, 7, 23])
def test_an_empty_corpus_is_refused(tmp_path: Path, tokenizer_folder: Path, per_step: int) -> None:
    write_parquet(tmp_path / "a.parquet", ["", None, " "], row_group_size=1)
    corpus = CorpusSpec(sources=(Source(str(tmp_path)),), tokenizer=str(tokenizer_folder), sequence_length=8)
    feeder = Feeder(corpus, sequences_per_step=per_step)
    for _ in range(2):  # a retried request gets the same answer
        with pytest.raises(DataError, match=r"an empty corpus: 3 units without a usable document \(3 empty, 0 dropped"):
            feeder.batch(0)
    feeder.close()


def test_supervised_pairs(tmp_path: Path, tokenizer_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [("q" * 3, "a" * 4), ("q" * 2, "a" * 30), ("q" * 40, "a"), ("", "a" * 5)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"q": q, "a": a}) + "\n" for q, a in rows))
    source = Source(str(tmp_path), prompt_column="q", response_column="a")
    corpus = CorpusSpec(sources=(source,), tokenizer=str(tokenizer_folder), sequence_length=12, window=1)
    feeder = Feeder(corpus, sequences_per_step=3)
    batch = token_batch(feeder.batch(0))
    tokenizer = tiny_tokenizer()
    q, a = (tokenizer(c)["input_ids"][0] for c in "qa")
    end = tokenizer.eos_token_id
    assert batch.ids_BT.tolist() == [[q] * 3 + [a] * 4 + [end] * 5, [q] * 2 + [a] * 10, [a] * 5 + [end] * 7]
    assert batch.segment_BT.tolist() == [[0] * 8 + [-1] * 4, [0] * 12, [0] * 6 + [-1] * 6]
    assert batch.target_BT.int().tolist() == [[0] * 3 + [1] * 5 + [0] * 4, [0] * 2 + [1] * 10, [0] + [1] * 5 + [0] * 6]
    assert feeder.counts() == {"documents": 4, "empty": 0, "cut": 0, "truncated": 1, "dropped": 1}
    assert "pairs longer than a sequence lose their end: 1" in caplog.text
    assert "pairs are left out" in caplog.text
    feeder.close()
    with_prompts = Feeder(replace(corpus, prompt_is_target=True), sequences_per_step=1)
    assert token_batch(with_prompts.batch(0)).target_BT.int().tolist() == [[0] + [1] * 7 + [0] * 4]
    with_prompts.close()


def test_labels_follow_the_documents(corpus: CorpusSpec) -> None:
    ((arrays, _),) = run(corpus, range(1))
    batch = token_batch(arrays)
    labels_BT = batch.labels_BT
    targets = int(batch.target_BT.sum())
    assert targets > 0
    assert int((labels_BT != -100).sum()) == targets, "every target has a token before it in its segment"


def test_tokenizers_that_cannot_serve(tokenizer_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no tokenizer"):
        load_encoder(str(tmp_path))
    with pytest.raises(ModelError, match=r"no token '<\|nowhere\|>'"):
        load_encoder(str(tokenizer_folder), end_token="<|nowhere|>")
    other = load_encoder(str(tokenizer_folder), end_token="<|im_end|>")
    assert other.end_id == tiny_tokenizer().convert_tokens_to_ids("<|im_end|>")
    assert other.fingerprint != load_encoder(str(tokenizer_folder)).fingerprint
