"""Small tables read whole: prompts, evaluation texts, task rows.  (Corpora are streamed; see `dataset.py`.)"""

from __future__ import annotations

import json
from typing import Any

from pyarrow import parquet as pq

from bitdistill_ray.data.readers import missing_column, read_chunks, reading_errors
from bitdistill_ray.data.sources import FileFormat, Source
from bitdistill_ray.data.units import compression, file_format, find_files
from bitdistill_ray.errors import DataError

TEXT = "text"


def read_rows(source: Source) -> list[dict[str, Any]]:
    """All rows of all files of `source`, in the order of their paths; a line of plain text is a row `{"text": line}`.

    Raises:
        DataError: damaged files, lines that are no JSON objects, bytes that are not UTF-8.
        StorageError: the store refuses.
    """
    rows: list[dict[str, Any]] = []
    for file in find_files(source):
        storage = source.storage(file.url)
        if file_format(file.url) is FileFormat.PARQUET:
            filesystem, path = storage.arrow_filesystem()
            with reading_errors(file.url), filesystem.open_input_file(path) as handle:
                rows += pq.read_table(handle).to_pylist()
            continue
        content = b"".join(read_chunks(storage, compression(file.url)))
        try:
            lines = content.decode("utf-8").splitlines(keepends=True)
        except UnicodeDecodeError as error:
            raise DataError(file.url, f"not UTF-8 at byte {error.start}", "Convert the file to UTF-8") from error
        if file_format(file.url) is FileFormat.TEXT:
            rows += [{TEXT: line} for line in lines]
        else:
            rows += [_json(file.url, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    return rows


def read_texts(source: Source) -> list[str]:
    """The text column of `source`, a row each."""
    texts = []
    for row in read_rows(source):
        if source.text_column not in row:
            raise missing_column(source.path, source.text_column, list(row))
        texts.append(str(row[source.text_column] or ""))
    return texts


def _json(where: str, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(where, f"line {number} is not JSON: {error.msg}", "Mend the line") from error
    if not isinstance(row, dict):
        raise DataError(where, f"line {number} is not a JSON object", "Write one object a line")
    return row
