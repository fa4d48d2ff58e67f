"""Where a corpus may lie besides folders and S3: web servers, other fsspec stores, the hub, saved data sets."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet as pq

from bitdistill_ray.data.batch import BatchArrays
from bitdistill_ray.data.documents import Counts, Piece, read_documents
from bitdistill_ray.data.feeder import Feeder
from bitdistill_ray.data.readers import read_parquet
from bitdistill_ray.data.sources import CorpusSpec, Source
from bitdistill_ray.data.units import list_units
from bitdistill_ray.errors import ConfigError, DataError, StorageError
from bitdistill_ray.storage import Storage
from tests.data.conftest import documents, write_parquet
from tests.data.web import Files, Hub, serve

READ_HERE = """
import sys
from bitdistill_ray.data.batch import BatchArrays
from bitdistill_ray.data.documents import Counts, read_documents
from bitdistill_ray.data.sources import CorpusSpec, Source
from bitdistill_ray.data.units import list_units
from bitdistill_ray.errors import BitdistillError
corpus = CorpusSpec(sources=(Source(sys.argv[1]),), tokenizer="", sequence_length=8)
try:
    for unit in list_units(corpus):
        for piece in read_documents(unit, corpus, Counts()):
            print(unit.name, unit.stamp, piece.text, sep="|")
except BitdistillError as error:
    print(type(error).__name__, error)
"""


def spec(source: Source) -> CorpusSpec:
    return CorpusSpec(sources=(source,), tokenizer="", sequence_length=8)


def texts(source: Source) -> list[str]:
    corpus = spec(source)
    pieces = (piece for unit in list_units(corpus) for piece in read_documents(unit, corpus, Counts()))
    return [piece.text for piece in pieces if isinstance(piece, Piece)]


def refused_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_a_web_server(corpus_folder: Path) -> None:
    with serve(Files, corpus_folder) as url:
        for name in ("a.parquet", "c.jsonl", "d.jsonl.gz", "e.jsonl.zst", "f.txt"):
            assert texts(Source(f"{url}/{name}?download=true")) == texts(Source(str(corpus_folder / name)))
        with pytest.raises(StorageError, match=r"gone\.jsonl: does not exist"):
            list_units(spec(Source(f"{url}/gone.jsonl")))
    with pytest.raises(StorageError, match="cannot reach the store"):
        list_units(spec(Source(f"http://127.0.0.1:{refused_port()}/a.jsonl")))


def test_another_store_of_fsspec_gives_what_the_folder_gives(corpus_folder: Path, tokenizer_folder: Path) -> None:
    url = f"memory://{uuid.uuid4().hex}/{corpus_folder.name}"
    Storage(url).upload_folder(corpus_folder)
    corpora = [
        CorpusSpec(sources=(Source(path),), tokenizer=str(tokenizer_folder), sequence_length=48, window=16)
        for path in (str(corpus_folder), f"file://{corpus_folder}", url, f"{url}/**")
    ]
    expected: list[BatchArrays] = []
    for corpus in corpora:  # one after the other: memory:// has one position for all readers of a file
        feeder = Feeder(corpus, sequences_per_step=8, prefetch_steps=0)
        made = [feeder.batch(step) for step in range(6)]
        feeder.close()
        expected = expected or made
        for arrays, wanted in zip(made, expected, strict=True):
            for name, array in wanted.items():
                np.testing.assert_array_equal(arrays[name], array, err_msg=corpus.sources[0].path)


def test_a_store_without_a_driver_is_told(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="install fsspec's driver"):
        list_units(spec(Source("nowhere://bucket/x")))


@pytest.fixture(scope="module")
def hub_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the hub's parquet branch of a data set with two configs holds."""
    folder = tmp_path_factory.mktemp("hub")
    for place, column, seed in (
        ("default/train/0000", "text", 1),
        ("default/train/0001", "text", 2),
        ("default/test/0000", "text", 3),
        ("verse/partial-train/0000", "lines", 4),
    ):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        write_parquet(folder / f"{place}.parquet", documents(5, seed), row_group_size=3, column=column)
    return folder


@pytest.mark.slow
def test_a_data_set_of_the_hub(hub_folder: Path) -> None:
    """Over HTTP, with the hub's own client, in a process that was told where the hub is."""
    with serve(Hub, hub_folder) as url:
        lines = read_with_hub(url, "hub:org/tales")
        assert [line.split("|")[2] for line in lines] == documents(5, 1) + documents(5, 2)
        assert lines[0].startswith("0000.parquet@0|")
        assert ":ffff" in lines[0], "the hub's version of a file is part of its stamp"
        assert [line.split("|")[2] for line in read_with_hub(url, "hub:org/tales::test")] == documents(5, 3)
        verse = read_with_hub(url, "hub:org/tales:verse:train:lines")
        assert [line.split("|")[2] for line in verse] == documents(5, 4)
        direct = read_with_hub(url, "hf://datasets/org/tales@refs/convert/parquet/default/t*/0000.parquet")
        assert {line.split("|")[2] for line in direct} == set(documents(5, 1) + documents(5, 3))
        (unknown,) = read_with_hub(url, "hub:org/tales:prose")
        assert unknown.startswith("DataError hub:org/tales:prose: no config 'prose'; there are default, verse.")
        (unknown,) = read_with_hub(url, "hub:org/tales:default:dev")
        assert "no split 'dev'; there are test, train." in unknown
        (nobody,) = read_with_hub(url, "hub:org/nobody")
        assert nobody.startswith("StorageError hub:org/nobody: ")
        assert "HF_TOKEN" in nobody


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_hub_that_cannot_be_reached_is_one_line() -> None:
    (line,) = read_with_hub(f"http://127.0.0.1:{refused_port()}", "hub:org/tales")
    assert line.startswith("StorageError hub:org/tales: cannot reach the store")
    assert "download the data set and give its folder" in line


def read_with_hub(url: str, path: str) -> list[str]:
    environment = {**os.environ, "HF_ENDPOINT": url, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    environment.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-c", READ_HERE, path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("path", ["hub:tales", "hub:org/", "hub:org/tales/x", "hub:org/tales:a:b:c:d"])
def test_a_hub_name_that_is_none(path: str) -> None:
    with pytest.raises(ConfigError, match="Write hub:ORG/NAME"):
        list_units(spec(Source(path)))


def test_a_saved_data_set(tmp_path: Path) -> None:
    """`save_to_disk` of `datasets`: a folder of Arrow files, several batches each."""
    from datasets import Dataset

    saved = documents(30, 5)
    Dataset.from_dict({"text": saved, "n": list(range(30))}).save_to_disk(str(tmp_path / "saved"), num_shards=2)
    assert texts(Source(str(tmp_path / "saved"))) == saved
    with pytest.raises(DataError, match="no column 'words'; there are 'n', 'text'"):
        texts(Source(str(tmp_path / "saved"), text_column="words"))


def test_arrow_files_of_both_kinds(tmp_path: Path) -> None:
    table = pa.table({"text": documents(10, 6)})
    for name, new in (("a", pa.ipc.new_file), ("b", pa.ipc.new_stream)):
        with new(tmp_path / f"{name}.arrow", table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    assert texts(Source(str(tmp_path))) == 2 * documents(10, 6)
    (tmp_path / "c.arrow").write_bytes((tmp_path / "b.arrow").read_bytes()[:300])
    with pytest.raises(DataError, match=r"c\.arrow: corrupt"):
        texts(Source(str(tmp_path / "c.arrow")))


def test_a_row_group_is_never_whole_in_memory(tmp_path: Path) -> None:
    path, size = tmp_path / "big.parquet", 48 << 20
    draw = np.random.default_rng(0)
    text = [draw.bytes(1 << 8).hex() for _ in range(size >> 9)]
    pq.write_table(pa.table({"text": text}), path, row_group_size=len(text))
    assert pq.ParquetFile(path).num_row_groups == 1
    assert peak_while(read_parquet(Storage(str(path)), ["text"], 0)) < size / 4


def peak_while(records: Iterator[object]) -> int:
    """Bytes that Arrow held at most while `records` were read."""
    before, peak = pa.total_allocated_bytes(), 0
    for _ in records:
        peak = max(peak, pa.total_allocated_bytes() - before)
    return peak
