"""Listing a corpus: deterministic names, only data files, and every refusal with its reason."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from bitdistill_ray.data.shuffle import permutation, unit_order, window_order
from bitdistill_ray.data.sources import CorpusSpec, Source
from bitdistill_ray.data.units import Unit, list_units
from bitdistill_ray.errors import ConfigError, DataError, StorageError
from tests.data.conftest import write_parquet

NAMES = ["a.parquet@0", "a.parquet@1", "a.parquet@2", "c.jsonl", "d.jsonl.gz", "deep/b%231.parquet@0", "e.jsonl.zst",
         "f.txt", "g.txt.gz"]  # fmt: skip


def units_of(*sources: Source) -> tuple[Unit, ...]:
    return list_units(CorpusSpec(sources=sources, tokenizer="", sequence_length=8))


def test_a_folder_lists_its_data_files_and_row_groups(corpus_folder: Path) -> None:
    units = units_of(Source(str(corpus_folder)))
    assert [unit.name for unit in units] == NAMES
    assert [unit.row_group for unit in units[:4]] == [0, 1, 2, -1]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [("*.parquet", NAMES[:3]), ("**/*.parquet", [*NAMES[:3], NAMES[5]]), ("[cd].jsonl*", NAMES[3:5]),
     ("*/b*", [NAMES[5]]), ("?.txt", ["f.txt"])],
)  # fmt: skip
def test_globs(corpus_folder: Path, pattern: str, names: list[str]) -> None:
    # names are relative to the last folder before the pattern's first wildcard
    assert [unit.name for unit in units_of(Source(f"{corpus_folder}/{pattern}"))] == names


def test_relative_globs(corpus_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(corpus_folder)
    assert [unit.name for unit in units_of(Source("*.txt"))] == ["f.txt"]
    assert [unit.name for unit in units_of(Source("deep/*"))] == ["b%231.parquet@0"]


def test_one_file_has_the_name_it_has_in_its_folder(corpus_folder: Path) -> None:
    assert [unit.name for unit in units_of(Source(str(corpus_folder / "a.parquet")))] == NAMES[:3]


def test_several_sources_keep_their_order(corpus_folder: Path) -> None:
    units = units_of(Source(f"{corpus_folder}/f.txt"), Source(f"{corpus_folder}/c.jsonl"))
    assert [(unit.source, unit.name) for unit in units] == [(0, "f.txt"), (1, "c.jsonl")]


def test_two_sources_of_one_name_are_refused(corpus_folder: Path) -> None:
    twice = Source(str(corpus_folder))
    with pytest.raises(ConfigError, match="two sources are called 'mixed"):
        units_of(twice, twice)
    assert len(units_of(twice, Source(str(corpus_folder), name="other#1"))) == 2 * len(NAMES)
    assert Source(str(corpus_folder), name="other#1").label == "other%231"
    assert Source("s3://bucket/wiki/*.parquet").label == "wiki"


def test_one_column_of_a_pair_is_refused() -> None:
    with pytest.raises(ConfigError, match="only one of prompt_column and response_column"):
        Source("x", prompt_column="q")


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="gone: does not exist"):
        units_of(Source(str(tmp_path / "gone")))
    with pytest.raises(DataError, match="an empty folder"):
        units_of(Source(str(tmp_path)))
    (tmp_path / "x.csv").write_text("a,b")
    with pytest.raises(DataError, match=r"only x\.csv: nothing to read\. Give \.parquet"):
        units_of(Source(str(tmp_path)))
    with pytest.raises(DataError, match="a file of an unknown kind"):
        units_of(Source(str(tmp_path / "x.csv")))
    with pytest.raises(DataError, match="nothing to read"):
        units_of(Source(f"{tmp_path}/*.parquet"))


def test_text_files_hold_no_pairs(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("a")
    with pytest.raises(DataError, match=r"x\.txt: plain text where prompt and response"):
        units_of(Source(str(tmp_path), prompt_column="q", response_column="a"))


def test_a_bucket_lists_and_stamps_like_a_folder(corpus_folder: Path, s3_bucket: str, s3_endpoint: str) -> None:
    source = Source(f"{s3_bucket}/some/mixed", endpoint_url=s3_endpoint)
    source.storage(source.path).upload_folder(corpus_folder)
    units = units_of(source)
    assert [unit.name for unit in units] == NAMES
    assert all(unit.url.startswith(f"{s3_bucket}/some/mixed/") for unit in units)
    some = Source(f"{s3_bucket}/some/mixed/*.parquet", endpoint_url=s3_endpoint)
    assert [unit.name for unit in units_of(some)] == NAMES[:3]
    one = Source(f"{s3_bucket}/some/mixed/c.jsonl", endpoint_url=s3_endpoint)
    assert [unit.name for unit in units_of(one)] == ["c.jsonl"]
    old = units[3].stamp
    content = source.storage(source.path).read_bytes("c.jsonl")
    source.storage(source.path).write_bytes("c.jsonl", content[::-1])
    assert units_of(source)[3].stamp != old, "the same size, but another content"


def test_buckets_that_refuse(s3_bucket: str, s3_endpoint: str) -> None:
    with pytest.raises(StorageError, match="no such bucket"):
        units_of(Source("s3://there-is-no-such-bucket/x", endpoint_url=s3_endpoint))
    with pytest.raises(StorageError, match="does not exist"):
        units_of(Source(f"{s3_bucket}/nothing/here", endpoint_url=s3_endpoint))
    with pytest.raises(StorageError, match="cannot reach the store"):
        units_of(Source("s3://bucket/x", endpoint_url="http://127.0.0.1:9"))


def test_a_private_bucket_is_denied_to_strangers(corpus_folder: Path, s3_bucket: str, s3_endpoint: str) -> None:
    Source(s3_bucket, endpoint_url=s3_endpoint).storage(s3_bucket).upload_folder(corpus_folder)
    stranger = Source(f"{s3_bucket}/a.parquet", endpoint_url=s3_endpoint, anonymous=True, region="us-east-1")
    with pytest.raises(StorageError, match="access denied"):
        units_of(stranger)


def test_names_do_not_depend_on_when_files_were_made(tmp_path: Path, corpus_folder: Path) -> None:
    copied = tmp_path / "mixed"
    copied.mkdir()
    for file in sorted(corpus_folder.glob("*.parquet"), reverse=True):
        shutil.copy(file, copied)
    write_parquet(copied / "B.parquet", ["x"], row_group_size=1)
    assert [unit.name for unit in units_of(Source(str(copied)))] == ["B.parquet@0", *NAMES[:3]]


def test_orders_are_permutations_and_stay_what_they_are() -> None:
    assert sorted(permutation(1000, "a").tolist()) == list(range(1000))
    assert permutation(0, "a").tolist() == []
    # Fixed for ever: checkpoints hold positions in these orders.
    assert unit_order(8, seed=0, epoch=0).tolist() == FIXED_UNITS
    assert window_order(8, seed=0, epoch=1, window=2).tolist() == FIXED_WINDOW
    assert unit_order(50, seed=0, epoch=0).tolist() != unit_order(50, seed=0, epoch=1).tolist()
    assert unit_order(50, seed=0, epoch=0).tolist() != unit_order(50, seed=1, epoch=0).tolist()


FIXED_UNITS = [1, 4, 3, 0, 6, 5, 2, 7]
FIXED_WINDOW = [6, 3, 0, 5, 2, 4, 1, 7]
