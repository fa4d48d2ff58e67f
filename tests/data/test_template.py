"""Rows of a task as prompts and answers: what is trained on is what is measured, whatever kind of file they are in."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import ipc
from pyarrow import parquet as pq

from bitdistill_ray.data.documents import Counts, Pair, read_documents
from bitdistill_ray.data.ledger import corpus_fingerprint
from bitdistill_ray.data.sources import CorpusSpec, Source
from bitdistill_ray.data.template import Template
from bitdistill_ray.data.units import list_units
from bitdistill_ray.errors import ConfigError, DataError
from bitdistill_ray.evaluate_config import TaskConfig
from bitdistill_ray.evaluation.tasks import template_of
from tests.data.conftest import tokenizer_folder as tokenizer_folder

ROWS = [{"premise": "It rained {hard}.", "hypothesis": "It was dry.", "label": 2},
        {"premise": "He sang.", "hypothesis": "He made a sound.", "label": 0}]  # fmt: skip
TEXT, WORDS = "{premise}\n{{so}} {hypothesis}:", ((" true"), (" unknown"), (" false"))
PAIRS = [Pair("It rained {hard}.\n{so} It was dry.:", " false"), Pair("He sang.\n{so} He made a sound.:", " true")]
LABELLED = Template(TEXT, "label", tuple((str(i), words) for i, words in enumerate(WORDS)))


def corpus_of(path: Path, template: Template) -> CorpusSpec:
    return CorpusSpec(sources=(Source(str(path), template=template),), tokenizer="", sequence_length=8)


def pairs_of(path: Path, template: Template) -> list[object]:
    corpus = corpus_of(path, template)
    return [d for unit in list_units(corpus) for d in read_documents(unit, corpus, Counts())]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow"])
def test_labels_become_words_in_every_kind_of_file(tmp_path: Path, kind: str) -> None:
    path, table = tmp_path / f"rows.{kind}", pa.Table.from_pylist(ROWS)
    if kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    elif kind == "parquet":
        pq.write_table(table, path)
    else:
        with ipc.new_file(path, table.schema) as file:
            file.write_table(table)
    assert pairs_of(path, LABELLED) == PAIRS
    task = TaskConfig(name="t", path=("-",), template=TEXT, labels=WORDS)  # type: ignore[arg-type]
    measured = template_of(task)
    assert measured == LABELLED
    assert [Pair(measured.prompt(row, ""), measured.answer(row, "")) for row in ROWS] == PAIRS


def test_an_answer_may_be_a_column_and_a_label_a_word(tmp_path: Path) -> None:
    rows = [{"q": "2 + 2", "a": "4", "kind": "easy"}, {"q": None, "a": "?", "kind": "hard"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert pairs_of(path, Template("{q} is ", "a")) == [Pair("2 + 2 is ", "4"), Pair(" is ", "?")]
    by_word = Template("{q}", "kind", (("hard", " H"), ("easy", " E")))
    assert pairs_of(path, by_word) == [Pair("2 + 2", " E"), Pair("", " H")]
    assert [by_word.label(row, "") for row in rows] == [1, 0]


def test_what_a_row_does_not_have_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "a", "label": -1}), encoding="utf-8")
    with pytest.raises(DataError, match=r"rows\.jsonl: label '-1', and the labels are 0, 1\. Give it words"):
        pairs_of(path, Template("{text}", "label", (("0", " no"), ("1", " yes"))))
    with pytest.raises(DataError, match=r"no column 'premise'"):
        pairs_of(path, LABELLED)
    with pytest.raises(DataError, match=r"where: no column 'premise', which the template names\. Columns: label"):
        LABELLED.prompt({"label": 1}, "where")
    with pytest.raises(ConfigError, match=r"the field {text\.x}"):
        Template("{text.x}", "label")


def test_another_template_is_another_corpus(tmp_path: Path, tokenizer_folder: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[0]), encoding="utf-8")
    found = []
    for template in (LABELLED, Template(TEXT + " ", "label", LABELLED.words)):
        corpus = corpus_of(tmp_path, template)
        units = list_units(corpus)
        encoder = CorpusSpec(sources=corpus.sources, tokenizer=str(tokenizer_folder), sequence_length=8).encoder()
        found.append(corpus_fingerprint(corpus, units, encoder)["packing"])
    assert found[0] != found[1]
