"""API keys: who may ask, and how much.  `bitdistill serve key --file keys.json --name NAME` makes one.

A key is 256 random bits, so its SHA-256 is as safe at rest as a slow hash would be (those are for passwords, which can
be guessed), and checking one costs a microsecond.  Every key of the file is compared, each in constant time.
"""

from __future__ import annotations

import argparse
import hashlib
import hmac
import json
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bitdistill_ray.errors import BitdistillError, ServeError
from bitdistill_ray.storage import Storage

PREFIX = "bd-"


class ApiKey(BaseModel):
    """One key, by its hash.  Rates hold over all replicas of an application; none given: no limit."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    requests_per_minute: int | None = Field(None, ge=1)
    tokens_per_minute: int | None = Field(None, ge=1)


class KeyFile(BaseModel):
    """The file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    keys: tuple[ApiKey, ...]

    @classmethod
    def read(cls, url: str) -> KeyFile:
        """Read a file of keys, local or in object storage.  Raises ServeError or StorageError."""
        try:
            return cls.model_validate_json(Storage(url).read_bytes(""))
        except ValidationError as error:
            first = error.errors(include_input=False)[0]
            where = ".".join(map(str, first["loc"])) or "it"
            raise ServeError(url, f"{where}: {first['msg']}", "Make keys with `bitdistill serve key`") from None

    def find(self, secret: str) -> ApiKey | None:
        """The key whose secret this is."""
        digest = _hash(secret)
        found = None
        for key in self.keys:
            if hmac.compare_digest(key.sha256, digest):
                found = key
        return found


def make_key(name: str, *, requests_per_minute: int | None, tokens_per_minute: int | None) -> tuple[str, ApiKey]:
    """A new secret, which nobody can tell again, and what is kept of it."""
    secret = PREFIX + secrets.token_urlsafe(32)
    key = ApiKey(name=name, sha256=_hash(secret), requests_per_minute=requests_per_minute,
                 tokens_per_minute=tokens_per_minute)  # fmt: skip
    return secret, key


def main(argv: Sequence[str] | None = None) -> int:
    """`bitdistill serve key`: add a key to a local file, and print its secret once."""
    parser = argparse.ArgumentParser(prog="bitdistill serve key", description="Make an API key.")
    parser.add_argument("--file", type=Path, required=True, help="where keys are kept, hashed; made where it is not")
    parser.add_argument("--name", required=True, help="who it is for")
    parser.add_argument("--requests-per-minute", type=int)
    parser.add_argument("--tokens-per-minute", type=int, help="of prompts and answers")
    args = parser.parse_args(argv)
    try:
        file = KeyFile.read(str(args.file)) if args.file.exists() else KeyFile(keys=())
        if any(key.name == args.name for key in file.keys):
            raise ServeError(f"--name {args.name}", "has a key already", f"Remove it from {args.file} first")
        rates = {"requests_per_minute": args.requests_per_minute, "tokens_per_minute": args.tokens_per_minute}
        secret, key = make_key(args.name, **rates)
    except ValidationError as error:
        print(f"{error.errors()[0]['loc'][0]}: {error.errors()[0]['msg']}", file=sys.stderr)
        return 2
    except BitdistillError as error:
        print(error, file=sys.stderr)
        return 2
    _write(args.file, KeyFile(keys=(*file.keys, key)))
    print(secret)
    return 0


def _write(path: Path, file: KeyFile) -> None:
    path.touch(mode=0o600)
    path.write_text(json.dumps(file.model_dump(exclude_none=True), indent=2) + "\n")


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()
