"""Files to records: parquet, Arrow, JSONL and plain text, a piece at a time.

A record is one text per wanted column, or None where the file has none; with `labels`, integers and truth values become
text.  Nothing is held whole: parquet comes in batches of rows (of however large a row group), Arrow in its own batches,
JSONL line by line, text in chunks; so the largest thing in memory is one record, or one batch of an Arrow file.  Every
complaint names the file and the place in it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
from pyarrow import parquet as pq

from bitdistill_ray.errors import DataError
from bitdistill_ray.storage import Storage, storage_errors

Record = tuple[str | None, ...]

CHUNK_BYTES = 1 << 20
PARQUET_ROWS = 64
ARROW_MAGIC = b"ARROW1"
UTF8_BOM = b"\xef\xbb\xbf"
ENCODING_REMEDY = "Convert the file to UTF-8 (for example with iconv), or leave it out"


@contextmanager
def reading_errors(where: str) -> Iterator[None]:
    """Tell a store that failed (StorageError) from a file that is damaged (DataError).

    pyarrow raises OSError for both; those of a store carry an errno or the words of its client, or its client's type.
    """
    try:
        with storage_errors(where):
            try:
                yield
            except OSError as error:
                if type(error) is not OSError or error.errno is not None or "AWS Error" in str(error):
                    raise
                raise _corrupt(where, error) from error
    except pa.ArrowException as error:
        raise _corrupt(where, error) from error


def _corrupt(where: str, error: Exception) -> DataError:
    words = " ".join(str(error).split()).rstrip(".")
    return DataError(where, f"corrupt: {words}", "Write or download the file again, or leave it out")


def read_parquet(storage: Storage, columns: Sequence[str], row_group: int, *, labels: bool = False) -> Iterator[Record]:
    """The records of one row group of the parquet file at `storage`.

    Raises DataError for a column that is missing or holds no strings, invalid UTF-8, and damaged bytes.
    """
    where = storage.url
    filesystem, path = storage.arrow_filesystem()
    with reading_errors(where), filesystem.open_input_file(path) as handle:
        file = pq.ParquetFile(handle, pre_buffer=False, buffer_size=CHUNK_BYTES)
        schema = file.schema_arrow
        for column in columns:
            _check_column(where, schema, column, labels)
        row = 0
        for batch in file.iter_batches(batch_size=PARQUET_ROWS, row_groups=[row_group], columns=list(columns)):
            for values in zip(*(batch.column(column) for column in columns), strict=True):
                yield tuple(_arrow_text(where, f"row {row} in row group {row_group}", value) for value in values)
                row += 1


def read_arrow(storage: Storage, columns: Sequence[str], *, labels: bool = False) -> Iterator[Record]:
    """The records of an Arrow file (the stream or the file format, as `datasets` saves them), batch by batch.

    Raises as `read_parquet` does.
    """
    where = storage.url
    filesystem, path = storage.arrow_filesystem()
    with reading_errors(where), filesystem.open_input_file(path) as handle:
        is_file = handle.read(len(ARROW_MAGIC)) == ARROW_MAGIC
        handle.seek(0)
        reader = pa.ipc.open_file(handle) if is_file else pa.ipc.open_stream(handle)
        for column in columns:
            _check_column(where, reader.schema, column, labels)
        batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
        for number, batch in enumerate(batches):
            for row, values in enumerate(zip(*(batch.column(column) for column in columns), strict=True)):
                yield tuple(_arrow_text(where, f"row {row} of batch {number}", value) for value in values)


def _check_column(where: str, schema: Any, column: str, labels: bool) -> None:
    if column not in schema.names:
        raise missing_column(where, column, schema.names)
    kind = schema.field(column).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    known = [pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view]
    known += [pa.types.is_integer, pa.types.is_boolean] if labels else []
    if not any(is_kind(kind) for is_kind in known):
        raise DataError(where, f"column {column!r} holds {kind}, not text", "Name a column of strings")


def _arrow_text(where: str, row: str, value: Any) -> str | None:
    try:
        text = value.as_py()
    except UnicodeDecodeError as error:
        raise DataError(where, f"not UTF-8 at byte {error.start} of {row}", ENCODING_REMEDY) from error
    return None if text is None else str(text)


def missing_column(where: str, column: str, present: Sequence[str]) -> DataError:
    """The complaint about a column that is not there; it names those that are."""
    return DataError(where, f"no column {column!r}; there are {', '.join(map(repr, sorted(present))) or 'none'}",
                     "Set text_column (or prompt_column and response_column) to one of them")  # fmt: skip


def read_chunks(storage: Storage, compression: str | None) -> Iterator[bytes]:
    """The bytes of a file, decompressed, in chunks of CHUNK_BYTES at most; a byte order mark is dropped."""
    filesystem, path = storage.arrow_filesystem()
    with (
        reading_errors(storage.url),
        filesystem.open_input_stream(path, compression=compression, buffer_size=CHUNK_BYTES) as stream,
    ):
        while chunk := stream.read(CHUNK_BYTES):
            yield bytes(chunk)


def read_text(storage: Storage, compression: str | None) -> Iterator[str]:
    """A plain text file as pieces of text; together they are its content, less a byte order mark.

    Raises DataError with the byte offset (of the decompressed content) where it is not UTF-8.
    """
    held, offset = b"", 0  # bytes not yet decoded, and where they begin
    for chunk in read_chunks(storage, compression):
        held += chunk
        if offset == 0 and held.startswith(UTF8_BOM):
            held, offset = held[len(UTF8_BOM) :], len(UTF8_BOM)
        try:
            text, used = held.decode("utf-8"), len(held)
        except UnicodeDecodeError as error:
            if error.reason != "unexpected end of data":  # else: a character cut by the chunk's end
                raise _not_utf8(storage.url, offset + error.start) from error
            text, used = held[: error.start].decode("utf-8"), error.start
        held, offset = held[used:], offset + used
        if text:
            yield text
    if held:
        raise _not_utf8(storage.url, offset)


def _not_utf8(where: str, offset: int) -> DataError:
    return DataError(where, f"not UTF-8 at byte {offset}", ENCODING_REMEDY)


def read_jsonl(
    storage: Storage, compression: str | None, columns: Sequence[str], max_line: int, *, labels: bool = False
) -> Iterator[Record]:
    """The records of a JSONL file; blank lines are passed over.

    Raises DataError for a line that is not UTF-8 (with its byte offset), no JSON object, lacks a column, or is longer
    than `max_line` bytes (a line must be parsed whole, so it is refused before it fills the memory).
    """
    where = storage.url
    for number, (offset, line) in enumerate(_lines(storage, compression, max_line), start=1):
        if line.isspace() or not line:
            continue
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise _not_utf8(where, offset + error.start) from error
        except json.JSONDecodeError as error:
            raise DataError(f"{where}:{number}", f"not JSON: {error}", "Mend or remove the line") from error
        if not isinstance(record, dict):
            raise DataError(f"{where}:{number}", f"a JSON {type(record).__name__}, not an object",
                            'Write one object such as {"text": "…"} on each line')  # fmt: skip
        yield tuple(_json_text(f"{where}:{number}", record, column, labels) for column in columns)


def _json_text(where: str, record: dict[str, Any], column: str, labels: bool) -> str | None:
    if column not in record:
        raise missing_column(where, column, list(record))
    value = record[column]
    if labels and isinstance(value, int):
        return str(value)
    if value is not None and not isinstance(value, str):
        raise DataError(where, f"{column!r} holds {type(value).__name__}, not text", "Name a key that holds strings")
    return value


def _lines(storage: Storage, compression: str | None, max_line: int) -> Iterator[tuple[int, bytes]]:
    """(byte offset, line without its end) of each line."""
    parts: list[bytes] = []
    offset, length, start = 0, 0, True
    for chunk in read_chunks(storage, compression):
        content = chunk
        if start:
            start = False
            if content.startswith(UTF8_BOM):
                content, offset = content[len(UTF8_BOM) :], len(UTF8_BOM)
        *ended, rest = content.split(b"\n")
        for line in ended:
            whole = b"".join([*parts, line])
            parts, length = [], 0
            yield offset, whole
            offset += len(whole) + 1
        parts.append(rest)
        length += len(rest)
        if length > max_line:
            raise DataError(storage.url, f"a line longer than {max_line:,} bytes at byte {offset}",
                            "Raise data.max_document_characters, or store such documents as .txt")  # fmt: skip
    if length:
        yield offset, b"".join(parts)
