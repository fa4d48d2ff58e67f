"""Readers and documents: what is in the files comes out, and every kind of damage is named with its place."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet as pq

from bitdistill_ray.data import readers
from bitdistill_ray.data.documents import Counts, Pair, Piece, document_pieces, read_documents
from bitdistill_ray.data.sources import CorpusSpec, Source
from bitdistill_ray.data.units import list_units
from bitdistill_ray.errors import DataError, StorageError
from tests.data.conftest import documents, to_jsonl, write_parquet


def read_all(path: Path, *, limit: int = 10_000_000, **source: Any) -> tuple[list[Piece | Pair], Counts]:
    corpus = CorpusSpec(
        sources=(Source(str(path), **source),), tokenizer="", sequence_length=8, max_document_characters=limit
    )
    counts = Counts()
    return [d for unit in list_units(corpus) for d in read_documents(unit, corpus, counts)], counts


def texts(found: list[Piece | Pair]) -> list[str]:
    return [piece.text for piece in found if isinstance(piece, Piece)]


@pytest.mark.parametrize(
    ("name", "compress"), [("x.jsonl", bytes), ("x.jsonl.gz", gzip.compress), ("x.ndjson.zst", zstandard.compress)]
)
def test_jsonl_in_every_compression(tmp_path: Path, name: str, compress: object) -> None:
    wanted = documents(300, 1)
    assert callable(compress)
    (tmp_path / name).write_bytes(compress(b"\xef\xbb\xbf" + to_jsonl(wanted[:200]) + b"\n" + to_jsonl(wanted[200:])))
    found, counts = read_all(tmp_path / name)
    assert texts(found) == wanted
    assert counts == Counts(documents=300)


def test_concatenated_gzip_members_are_read_to_the_end(tmp_path: Path) -> None:
    wanted = documents(6, 1)
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(to_jsonl(wanted[:3])) + gzip.compress(to_jsonl(wanted[3:])))
    assert texts(read_all(tmp_path)[0]) == wanted


def test_the_last_line_needs_no_end_and_windows_ends_are_fine(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "a"}\r\n\r\n{"text": "b"}')
    assert texts(read_all(tmp_path)[0]) == ["a", "b"]


def test_parquet_row_groups_in_their_order(tmp_path: Path) -> None:
    wanted = documents(150, 2)
    write_parquet(tmp_path / "x.parquet", wanted, row_group_size=70)
    assert texts(read_all(tmp_path)[0]) == wanted


def test_empty_documents_are_skipped_and_counted(tmp_path: Path) -> None:
    write_parquet(tmp_path / "x.parquet", ["a", None, "", " \n\t", "b"], row_group_size=9)
    (tmp_path / "y.jsonl").write_text('{"text": null}\n{"text": ""}\n{"text": "c"}\n')
    (tmp_path / "z.txt").write_text("")
    found, counts = read_all(tmp_path)
    assert texts(found) == ["a", "b", "c"]
    assert counts == Counts(documents=3, empty=6)


def test_text_across_chunk_borders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = "naïve – 雨 🦊\r\n" * 50
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbf" + wanted.encode())
    for size in (1, 2, 3, 5, 64):
        monkeypatch.setattr(readers, "CHUNK_BYTES", size)
        found, _ = read_all(tmp_path)
        assert texts(found) == [wanted]


def test_not_utf8_names_the_file_and_the_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "CHUNK_BYTES", 7)
    good = "çedilla " * 10
    (tmp_path / "x.txt").write_bytes(good.encode() + b"\xff and on")
    with pytest.raises(DataError, match=rf"x\.txt: not UTF-8 at byte {len(good.encode())}\."):
        read_all(tmp_path / "x.txt")
    (tmp_path / "x.txt").write_bytes(good.encode() + "雨".encode()[:2])
    with pytest.raises(DataError, match=rf"x\.txt: not UTF-8 at byte {len(good.encode())}\."):
        read_all(tmp_path / "x.txt")
    (tmp_path / "x.txt").write_bytes("a file from elsewhere".encode("utf-16"))
    with pytest.raises(DataError, match=r"not UTF-8 at byte 0\."):
        read_all(tmp_path / "x.txt")
    first = b'{"text": "fine"}\n'
    (tmp_path / "x.jsonl").write_bytes(first + b'{"text": "caf\xe9"}\n')
    with pytest.raises(DataError, match=rf"x\.jsonl: not UTF-8 at byte {len(first) + 13}\."):
        read_all(tmp_path / "x.jsonl")


def test_not_utf8_in_parquet_names_the_row(tmp_path: Path) -> None:
    column = pa.array([b"fine", b"caf\xe9!"], pa.binary()).cast(pa.string(), safe=False)
    pq.write_table(pa.table({"text": column}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"x\.parquet: not UTF-8 at byte 3 of row 1 in row group 0"):
        read_all(tmp_path)


def test_a_missing_column_names_those_that_are_there(tmp_path: Path) -> None:
    write_parquet(tmp_path / "x.parquet", ["a"], row_group_size=1, column="body")
    with pytest.raises(DataError, match=r"x\.parquet: no column 'text'; there are 'body', 'id'"):
        read_all(tmp_path)
    assert texts(read_all(tmp_path, text_column="body")[0]) == ["a"]
    (tmp_path / "x.parquet").unlink()
    (tmp_path / "x.jsonl").write_text('{"body": "a", "n": 2}\n')
    with pytest.raises(DataError, match=r"x\.jsonl:1: no column 'text'; there are 'body', 'n'"):
        read_all(tmp_path)


def test_a_column_of_another_type_is_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "x.parquet", ["a"], row_group_size=1)
    with pytest.raises(DataError, match="column 'id' holds int64, not text"):
        read_all(tmp_path, text_column="id")
    (tmp_path / "x.parquet").unlink()
    (tmp_path / "x.jsonl").write_text('{"text": ["a"]}\n')
    with pytest.raises(DataError, match="'text' holds list, not text"):
        read_all(tmp_path)


def test_lines_that_are_no_json_objects(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(DataError, match=r"x\.jsonl:2: not JSON"):
        read_all(tmp_path)
    (tmp_path / "x.jsonl").write_text('["a"]\n')
    with pytest.raises(DataError, match=r"x\.jsonl:1: a JSON list, not an object"):
        read_all(tmp_path)


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.jsonl.zst"])
@pytest.mark.parametrize("damage", ["truncated", "garbled", "foreign"])
def test_damaged_compression_is_no_data(tmp_path: Path, name: str, damage: str) -> None:
    compress = gzip.compress if name.endswith("gz") else zstandard.compress
    whole = bytearray(compress(to_jsonl(documents(200, 1))))
    if damage == "truncated":
        whole = whole[: len(whole) // 2]
    elif damage == "garbled":
        whole[len(whole) // 2 : len(whole) // 2 + 40] = bytes(40)
    else:
        whole = bytearray(to_jsonl(documents(200, 1)))
    (tmp_path / name).write_bytes(whole)
    with pytest.raises(DataError, match=rf"{name.replace('.', '[.]')}: (corrupt|not UTF-8)|{name}:[0-9]+: not JSON"):
        read_all(tmp_path)


@pytest.mark.parametrize("damage", ["empty", "footer", "pages"])
def test_a_damaged_parquet_file(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "x.parquet"
    write_parquet(path, documents(200, 1), row_group_size=500)
    content = bytearray(path.read_bytes())
    if damage == "empty":
        content = bytearray()
    elif damage == "footer":
        content = content[:-20]
    else:
        content[100:-2000] = bytes(len(content[100:-2000]))
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"x\.parquet: corrupt: .*Write or download the file again"):
        read_all(tmp_path)


def test_a_file_that_vanished_is_the_stores_fault(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(to_jsonl(["a"]))
    corpus = CorpusSpec(sources=(Source(str(tmp_path)),), tokenizer="", sequence_length=8)
    (unit,) = list_units(corpus)
    (tmp_path / "x.jsonl").unlink()
    with pytest.raises(StorageError, match=r"x\.jsonl: does not exist"):
        list(read_documents(unit, corpus, Counts()))


def test_a_gigantic_document_is_cut_and_counted(tmp_path: Path) -> None:
    wanted = documents(2, 1)
    (tmp_path / "x.jsonl").write_bytes(to_jsonl(["short", *wanted]))
    found, counts = read_all(tmp_path, limit=50)
    assert counts == Counts(documents=3, cut=2)
    assert max(map(len, texts(found))) <= 50
    assert "".join(texts(found)) == "short" + "".join(wanted)
    assert sum(piece.last for piece in found if isinstance(piece, Piece)) == 3
    assert all(text[0] == " " for text in texts(found)[2:] if not text[0].isdigit()), "cut before a space"


def test_a_line_that_would_fill_the_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitdistill_ray.data.documents.LINE_OVERHEAD", 100)
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": "a"}) + "\n" + json.dumps({"x": "y" * 3_000_000}) + "\n")
    with pytest.raises(DataError, match=r"x\.jsonl: a line longer than 1,300 bytes at byte 14"):
        read_all(tmp_path, limit=100)


@given(text=st.text(alphabet="ab \n雨", max_size=200), limit=st.integers(1, 20), size=st.integers(1, 50))
def test_pieces_lose_nothing(text: str, limit: int, size: int) -> None:
    counts = Counts()
    pieces = list(document_pieces((text[i : i + size] for i in range(0, len(text), size)), limit, counts))
    assert "".join(piece.text for piece in pieces) == (text if counts.documents else "")
    assert all(len(piece.text) <= limit for piece in pieces)
    assert [piece.last for piece in pieces] == [False] * (len(pieces) - 1) + [True] * bool(pieces)
    assert (counts.documents, counts.empty) in ((1, 0), (0, 1))


def test_pairs(tmp_path: Path) -> None:
    rows = [{"q": "2+2", "a": "4"}, {"q": None, "a": "free"}, {"q": "why", "a": " "}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found, counts = read_all(tmp_path, prompt_column="q", response_column="a")
    assert found == [Pair("2+2", "4"), Pair("", "free")]
    assert counts == Counts(documents=2, empty=1)
