"""A block: the entries of some sequences as one Arrow IPC file, and beside it an index that says whether it is whole.

    NAME.arrow   columns: key; of every array of an entry its bytes, with dtype and shape in the field's metadata
    NAME.json    the keys, the bytes of the block and its sha256; written after the block, so a block without one is
                 none, and with a sha256 of its own, so that it can be no less damaged than the block

NAME is a digest of the keys: two workers that write the same sequences write the same file.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from bitdistill_ray.cache.entry import Entry

BLOCK, INDEX = ".arrow", ".json"


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockIndex:
    """What a block holds, without its content."""

    keys: tuple[str, ...]
    size: int
    sha256: str

    def to_bytes(self) -> bytes:
        """The index file."""
        content = {"keys": self.keys, "size": self.size, "sha256": self.sha256}
        return json.dumps({"sha256": _sealed(content), "block": content}).encode()

    @classmethod
    def from_bytes(cls, raw: bytes) -> BlockIndex | None:
        """What `to_bytes` wrote; None where it is damaged."""
        try:
            tree = json.loads(raw)
            content = tree["block"]
            if tree["sha256"] != _sealed(content):
                return None
            return cls(keys=tuple(content["keys"]), size=content["size"], sha256=content["sha256"])
        except (ValueError, KeyError, TypeError):
            return None

    def fault(self, raw: bytes) -> str | None:
        """What is wrong with the bytes of the block; None where they are the ones that were written."""
        if len(raw) != self.size:
            return f"has {len(raw)} bytes of {self.size}"
        return None if hashlib.sha256(raw).hexdigest() == self.sha256 else "fails its checksum"


def _sealed(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def block_name(keys: list[str]) -> str:
    """The block's name, without a suffix."""
    return hashlib.sha256(" ".join(sorted(keys)).encode()).hexdigest()[:24]


def write_block(entries: dict[str, Entry]) -> tuple[bytes, BlockIndex]:
    """Entries by key (all with the same arrays) as a block and its index."""
    first = next(iter(entries.values()))
    columns: list[pa.Array] = [pa.array(list(entries), pa.string())]
    schema = [pa.field("key", pa.string())]
    for name, array in first.items():
        column = [np.asarray(entry[name], order="C") for entry in entries.values()]
        shapes = json.dumps([value.shape for value in column])
        columns.append(pa.array([value.tobytes() for value in column], pa.large_binary()))
        schema.append(pa.field(name, pa.large_binary(), metadata={"dtype": array.dtype.str, "shapes": shapes}))
    table = pa.record_batch(columns, schema=pa.schema(schema))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_batch(table)
    raw = sink.getvalue().to_pybytes()
    return raw, BlockIndex(keys=tuple(entries), size=len(raw), sha256=hashlib.sha256(raw).hexdigest())


def read_block(raw: bytes) -> dict[str, Entry]:
    """The entries of a block whose bytes are whole; the arrays are views of `raw`."""
    table = pa.ipc.open_file(pa.BufferReader(raw)).get_batch(0)
    entries: dict[str, Entry] = {key: {} for key in table.column("key").to_pylist()}
    for field, column in zip(table.schema, table.columns, strict=True):
        if field.name == "key":
            continue
        dtype, shapes = np.dtype(field.metadata[b"dtype"].decode()), json.loads(field.metadata[b"shapes"])
        for entry, value, shape in zip(entries.values(), column, shapes, strict=True):
            entry[field.name] = np.frombuffer(value.as_buffer(), dtype).reshape(shape)
    return entries
