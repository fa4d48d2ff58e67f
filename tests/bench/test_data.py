"""`bitdistill bench data`: the whole path from files to windows, on made-up text and on a user's."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from bitdistill_ray.bench import corpus, main
from bitdistill_ray.data.encoder import load_encoder
from bitdistill_ray.data.sources import CorpusSpec, Source
from tests.bench.test_report import KEYS
from tests.tiny_models import tiny_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """`text/a.jsonl` with 20 documents, and `tokenizer`."""
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "text").mkdir()
    texts = islice(corpus.made_up(["some", "words,", "again"], seed=1), 20)
    (tmp_path / "text" / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return tmp_path


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_speed_and_memory_of_a_users_text(folder: Path) -> None:
    file = folder / "out.json"
    arguments = ["--data", str(folder / "text"), "--tokenizer", str(folder / "tokenizer")]
    arguments += ["--files", "jsonl", "--megabytes", "0.2", "--times", "2"]
    assert main(["data", *arguments, "--json", str(file)]) == 0
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    rows = content["rows"]
    assert content["machine"]
    assert [(row["case"], row["metric"]) for row in rows] == [
        ("data, jsonl", metric) for metric in ("stream", "peak memory")
    ]
    for row in rows:
        assert set(row) == KEYS
        assert row["value"] > 0
        assert (row["share"] if row["metric"] == "stream" else row["ratio"]) > 0
    assert rows[1]["value"] > 50, "a Python with pyarrow and a tokenizer has more MiB than that"


def test_the_stream_has_the_tokenizers_tokens_and_an_end_for_each_document(folder: Path) -> None:
    spec = CorpusSpec(
        sources=(Source(str(folder / "text")),), tokenizer=str(folder / "tokenizer"), sequence_length=48, window=32
    )
    encoder = load_encoder(spec.tokenizer)
    texts = list(islice(corpus.documents_of(spec), 20))
    assert corpus.one_pass(spec, encoder) == corpus.tokenize(texts, encoder) + len(texts)


def test_sizes_that_make_no_sense_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--megabytes", "0"], ["--times", "1"], ["--data", "/nowhere"], ["--files", "pdf"]):
        assert main(["data", *arguments]) == 2
        assert arguments[1] in capsys.readouterr().err
