"""The units of a corpus: what one worker reads from start to end, and what a resumed run skips whole.

A unit is a row group of a parquet file, or a whole Arrow, JSONL or text file.  They are listed in the order of their
names, so that the list, and with it every sequence id, depends on the files alone.  A unit's stamp (size, and the
store's ETag where there is one) goes into the ledger's fingerprint: a resumed run notices files that were added, lost
or replaced.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from fsspec.utils import glob_translate
from pyarrow import fs
from pyarrow import parquet as pq

from bitdistill_ray.data.hub import resolve_hub
from bitdistill_ray.data.readers import reading_errors
from bitdistill_ray.data.sources import GLOB_CHARACTERS, CorpusSpec, FileFormat, Source, escape_id
from bitdistill_ray.errors import DataError
from bitdistill_ray.storage import storage_errors
from bitdistill_ray.storage_retry import patiently

WHOLE_FILE = -1
FOOTER_READERS = 16
ENDINGS = {".parquet": FileFormat.PARQUET, ".jsonl": FileFormat.JSONL, ".ndjson": FileFormat.JSONL,
           ".txt": FileFormat.TEXT, ".arrow": FileFormat.ARROW}  # fmt: skip
COMPRESSIBLE = (FileFormat.JSONL, FileFormat.TEXT)
WEB = ("http://", "https://")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """One row group, or one file (`row_group` is WHOLE_FILE).

    source  index of its Source in the corpus
    url     its file
    name    the UNIT part of sequence ids: the path below the source's folder, and `@ROW_GROUP`
    stamp   what tells this version of the file from another
    """

    source: int
    url: str
    name: str
    stamp: str
    row_group: int = WHOLE_FILE


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A file of a source: its URL, its path below the source's folder, and its stamp."""

    url: str
    path: str
    stamp: str


def file_format(path: str) -> FileFormat | None:
    """The format that a file's name tells, or None."""
    stem, ending = posixpath.splitext(_without_query(path).lower())
    if ending in COMPRESSIONS:
        found = ENDINGS.get(posixpath.splitext(stem)[1])
        return found if found in COMPRESSIBLE else None
    return ENDINGS.get(ending)


def compression(path: str) -> str | None:
    """pyarrow's name of the codec that a file's name tells, or None."""
    return COMPRESSIONS.get(posixpath.splitext(_without_query(path).lower())[1])


def _without_query(path: str) -> str:
    return path.partition("?")[0] if path.startswith(WEB) else path


def find_files(source: Source) -> list[FoundFile]:
    """The data files of a source in the order of their paths.

    Files of other kinds, and those whose path has a part that begins with `.` or `_`, are passed over.
    Raises StorageError (no such bucket, no access, no such path) and DataError (nothing that can be read).
    """
    source = resolve_hub(source)
    pattern: str | None = None
    if source.path.startswith(WEB) and file_format(source.path) is not None and not source.is_glob:
        storage = source.storage(source.path)  # to list it would be to download it
        name = posixpath.basename(_without_query(source.path))
        return [FoundFile(url=storage.url, path=name, stamp=storage.stamp())]
    root = source.path.rstrip("/")
    if source.is_glob:
        first = min(root.index(character) for character in GLOB_CHARACTERS if character in root)
        folder, slash, _ = root[:first].rpartition("/")
        root, pattern = folder or slash or ".", root[len(folder + slash) :]
    storage = source.storage(root)
    stamps = storage.stamps()
    if pattern is None and not stamps:
        return [_single_file(source)]
    wanted = re.compile(glob_translate(pattern)) if pattern is not None else None
    found = [
        FoundFile(url=storage.url_of(path), path=path, stamp=stamp)
        for path, stamp in stamps.items()
        if (wanted is None or wanted.match(path))
        and file_format(path) is not None
        and not any(part.startswith((".", "_")) for part in path.split("/"))
    ]
    if not found:
        others = f"only {', '.join(sorted(stamps)[:3])}" if stamps else "no file"
        raise DataError(source.path, f"{others}: nothing to read",
                        "Give .parquet, .arrow, .jsonl, .txt files (the last two also as .gz or .zst)")  # fmt: skip
    return sorted(found, key=lambda file: file.path)


def _single_file(source: Source) -> FoundFile:
    storage = source.storage(source.path)
    with storage_errors(source.path):
        filesystem, path = storage.arrow_filesystem()
        info = patiently(lambda: filesystem.get_file_info(path), source.path, patience_s=source.patience_s)
        if info.type is fs.FileType.NotFound:
            raise FileNotFoundError(source.path)
    if info.type is not fs.FileType.File:
        raise DataError(source.path, "an empty folder", "Check the path")
    if file_format(source.path) is None:
        raise DataError(source.path, "a file of an unknown kind",
                        "Give .parquet, .arrow, .jsonl or .txt (the last two also as .gz or .zst)")  # fmt: skip
    return FoundFile(url=storage.url, path=posixpath.basename(path), stamp=f"{info.size}:")


def list_units(corpus: CorpusSpec) -> tuple[Unit, ...]:
    """All units of a corpus: sources in their order, files by path, row groups by number.

    Reads the footers of parquet files, several at a time.  Raises StorageError, and DataError for a source without
    data, a corrupt footer or a text file where pairs are wanted.
    """
    return tuple(unit for index, source in enumerate(corpus.sources) for unit in _source_units(index, source))


def _source_units(index: int, source: Source) -> Iterator[Unit]:
    files = find_files(source)
    with ThreadPoolExecutor(FOOTER_READERS) as pool:
        for file, row_groups in zip(files, pool.map(lambda file: _row_groups(source, file), files), strict=True):
            for row_group in row_groups:
                suffix = "" if row_group == WHOLE_FILE else f"@{row_group}"
                name = escape_id(file.path) + suffix
                yield Unit(source=index, url=file.url, name=name, stamp=file.stamp, row_group=row_group)


def _row_groups(source: Source, file: FoundFile) -> range | tuple[int]:
    kind = file_format(file.path)
    if kind is FileFormat.TEXT and source.is_supervised:
        raise DataError(file.url, "plain text where prompt and response columns are wanted", "Give JSONL or parquet")
    if kind is not FileFormat.PARQUET:
        return (WHOLE_FILE,)
    filesystem, path = source.storage(file.url).arrow_filesystem()

    def footer() -> int:
        with reading_errors(file.url), filesystem.open_input_file(path) as handle:
            return int(pq.ParquetFile(handle).num_row_groups)

    return range(patiently(footer, file.url, patience_s=source.patience_s))
