"""A tokenizer folder, and a small corpus with a file of every kind."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet as pq

from bitdistill_ray.data.encoder import Encoder, load_encoder
from tests.tiny_models import SENTENCES, tiny_tokenizer


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def encoder(tokenizer_folder: Path) -> Encoder:
    return load_encoder(str(tokenizer_folder))


def documents(count: int, seed: int) -> list[str]:
    """Documents of 1 to 12 sentences, each different from all others."""
    draw = random.Random(seed)
    return [f"{seed}/{i} " + " ".join(draw.choices(SENTENCES, k=draw.randint(1, 12))) for i in range(count)]


def write_parquet(path: Path, texts: Sequence[str | None], *, row_group_size: int, column: str = "text") -> None:
    table = pa.table({"id": list(range(len(texts))), column: pa.array(texts, pa.string())})
    pq.write_table(table, path, row_group_size=row_group_size, compression="zstd")


def to_jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text, "n": 1}, ensure_ascii=False) + "\n" for text in texts).encode()


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """9 units: 4 row groups, two whole-file formats in three compressions; and files that are none of it."""
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "deep").mkdir()
    write_parquet(folder / "a.parquet", documents(20, 1), row_group_size=8)
    write_parquet(folder / "deep" / "b#1.parquet", documents(5, 2), row_group_size=8)
    (folder / "c.jsonl").write_bytes(to_jsonl(documents(12, 3)))
    (folder / "d.jsonl.gz").write_bytes(gzip.compress(to_jsonl(documents(9, 4))))
    (folder / "e.jsonl.zst").write_bytes(zstandard.compress(to_jsonl(documents(9, 5))))
    (folder / "f.txt").write_text("\n".join(documents(10, 6)))
    (folder / "g.txt.gz").write_bytes(gzip.compress("\n".join(documents(3, 7)).encode()))
    (folder / "_SUCCESS").write_bytes(b"")
    (folder / ".hidden.txt").write_bytes(b"never read")
    (folder / "README.md").write_bytes(b"never read")
    return folder
