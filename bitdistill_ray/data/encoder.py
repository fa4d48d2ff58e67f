"""Text to token ids, the same in every worker.

The driver loads the tokenizer once and stores its definition (the content of `tokenizer.json`); the feeder and its
readers rebuild it from that, so that they need neither the tokenizer's folder nor a network nor torch (four seconds of
a CPU), and cannot hold another version of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from bitdistill_ray.errors import ModelError
from bitdistill_ray.storage import Storage


@lru_cache(maxsize=4)
def _backend(definition: str) -> Any:
    """The Rust tokenizer of a definition, built once per process."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(definition)
    backend.no_truncation()
    backend.no_padding()
    return backend


@dataclass(frozen=True)
class Encoder:
    """A fast tokenizer by its definition, and the token that ends a document."""

    definition: str
    end_id: int

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """int32 ids of each text, without any special token added around it."""
        if not texts:
            return []
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    @property
    def backend(self) -> Any:
        """The tokenizer itself, of the library `tokenizers`."""
        return _backend(self.definition)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the definition and the end token."""
        return hashlib.sha256(f"{self.end_id}\n{self.definition}".encode()).hexdigest()


@dataclass(frozen=True)
class StoredEncoder:
    """An Encoder in a file of a run, for any node to fetch.

    Not an argument of the feeder's: Ray promises no restart to an actor that was given more than some kilobytes.
    """

    storage: Storage
    path: str

    @classmethod
    def of(cls, encoder: Encoder, storage: Storage, path: str) -> StoredEncoder:
        """Write the file."""
        storage.write_bytes(path, json.dumps({"end_id": encoder.end_id, "definition": encoder.definition}).encode())
        return cls(storage, path)

    def fetch(self) -> Encoder:
        """Read it."""
        return Encoder(**json.loads(self.storage.read_bytes(self.path)))


def load_encoder(tokenizer: str, *, end_token: str | None = None) -> Encoder:
    """Load a fast tokenizer from a local folder or the Hugging Face hub.

    `end_token` names the token that ends a document; None: the tokenizer's eos token.
    Raises ModelError: not found, no fast tokenizer, no such token.
    """
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(tokenizer)
    except (OSError, ValueError) as error:
        words = " ".join(str(error).split()).rstrip(".")
        raise ModelError(tokenizer, f"no tokenizer: {words}", "Give a folder or a model id that has one") from error
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(tokenizer, "a tokenizer without a fast implementation",
                         "Use a model whose folder has a tokenizer.json")  # fmt: skip
    if end_token is None and loaded.eos_token is None:
        raise ModelError(tokenizer, "a tokenizer without an eos token", "Name the token that ends a document")
    end = end_token or str(loaded.eos_token)
    end_id = backend.token_to_id(end)
    if end_id is None:
        raise ModelError(tokenizer, f"no token {end!r}", "Name a token of its vocabulary")
    return Encoder(definition=str(backend.to_str()), end_id=int(end_id))
