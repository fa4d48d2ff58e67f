"""Answers in storage: found by key, written in blocks, and never believed without their checksum.

    FOLDER/SPACE/about.json     whose answers these are, in words
    FOLDER/SPACE/blocks/…       blocks and their indexes (block.py)

A space is one teacher, tokenizer and kind of answer: whatever would change an answer changes its name, so an entry is
never out of date.  Opening reads the indexes alone.  Any number of workers, epochs and jobs may use a space together:
files are written whole or not at all, and their names say what they hold.

A block whose bytes are not those that were written is named in a line, removed, and its sequences are unknown from then
on: whoever needs them asks the teacher and writes them again.  A store that refuses raises its StorageError.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from bitdistill_ray.cache.block import BLOCK, INDEX, BlockIndex, block_name, read_block, write_block
from bitdistill_ray.cache.entry import Entry
from bitdistill_ray.errors import StorageError
from bitdistill_ray.storage import Storage

READERS = 16  # indexes read at a time
BLOCKS = "blocks"


class CacheStore:
    """The entries of one space, as this process knows them: those that were there at `open`, and its own."""

    def __init__(
        self, folder: Storage, about: dict[str, Any], *, memory_bytes: int, say: Callable[[str], object] = print
    ) -> None:
        self.about = about
        self.space = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:24]
        self.storage = folder.child(self.space)
        self.memory_bytes, self.say = memory_bytes, say
        self._indexes: dict[str, BlockIndex] = {}
        self._block_of: dict[str, str] = {}
        self._held: OrderedDict[str, tuple[int, dict[str, Entry]]] = OrderedDict()

    def __len__(self) -> int:
        """How many sequences are known."""
        return len(self._block_of)

    def __contains__(self, key: str) -> bool:
        return key in self._block_of

    def open(self) -> None:
        """Read the indexes."""
        paths = [path for path in self.storage.list(BLOCKS) if path.endswith(INDEX)]
        with ThreadPoolExecutor(READERS) as pool:
            for path, raw in zip(paths, pool.map(self._bytes, paths), strict=True):
                name = path.removeprefix(f"{BLOCKS}/").removesuffix(INDEX)
                index = None if raw is None else BlockIndex.from_bytes(raw)
                if index is not None:
                    self._know(name, index)
                elif raw is not None:
                    self._drop(name, "has a damaged index")

    def get(self, key: str) -> Entry | None:
        """The entry of `key`; None where there is none, or none that is whole.  Raises StorageError."""
        name = self._block_of.get(key)
        if name is None:
            return None
        if name not in self._held:
            entries = self._load(name)
            if entries is None:
                return None
            self._hold(name, entries)
        self._held.move_to_end(name)
        return self._held[name][1][key]

    def put(self, entries: dict[str, Entry]) -> None:
        """Write entries as one block.  Raises StorageError."""
        if not entries:
            return
        if not self._indexes:
            self.storage.write_bytes("about.json", json.dumps(self.about, indent=1).encode())
        name = block_name(list(entries))
        raw, index = write_block(entries)
        self.storage.write_bytes(f"{BLOCKS}/{name}{BLOCK}", raw)
        self.storage.write_bytes(f"{BLOCKS}/{name}{INDEX}", index.to_bytes())
        self._know(name, index)

    def _know(self, name: str, index: BlockIndex) -> None:
        self._indexes[name] = index
        self._block_of.update(dict.fromkeys(index.keys, name))

    def _load(self, name: str) -> dict[str, Entry] | None:
        raw = self._bytes(f"{BLOCKS}/{name}{BLOCK}")
        fault = "is gone" if raw is None else self._indexes[name].fault(raw)
        if raw is None or fault:
            self._drop(name, str(fault))
            return None
        return read_block(raw)

    def _hold(self, name: str, entries: dict[str, Entry]) -> None:
        """Keep a block in memory, and let go of those that were not asked for longest."""
        self._held[name] = (self._indexes[name].size, entries)
        while len(self._held) > 1 and sum(size for size, _ in self._held.values()) > self.memory_bytes:
            self._held.popitem(last=False)

    def _drop(self, name: str, fault: str) -> None:
        index = self._indexes.pop(name, None)
        keys = index.keys if index else ()
        for key in keys:
            if self._block_of.get(key) == name:
                del self._block_of[key]
        where = self.storage.url_of(f"{BLOCKS}/{name}{BLOCK}")
        self.say(f"teacher cache: {where} {fault}; removed, the teacher is asked again about "
                 f"{f'its {len(keys)} sequences' if index else 'its sequences'}")  # fmt: skip
        for suffix in (INDEX, BLOCK):
            self.storage.delete(f"{BLOCKS}/{name}{suffix}")

    def _bytes(self, path: str) -> bytes | None:
        """The content of a file, None where it is gone (another worker found it damaged)."""
        try:
            return self.storage.read_bytes(path)
        except StorageError as error:
            if isinstance(error.__cause__, FileNotFoundError) and error.what.startswith("does not exist"):
                return None
            raise
