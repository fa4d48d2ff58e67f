"""One small layer over local folders and object stores, so that no other part knows which of them it talks to.

fsspec carries the bytes (any URL it knows), and `arrow_filesystem` opens the same place for pyarrow's readers, which
are faster on S3.  Two promises hold everywhere.  A reader sees a whole file or none: a local write is renamed into
place, an object appears when its upload ends.  And a folder is whole or visibly not: `upload_folder` writes the
manifest `.complete.json` (name -> bytes) last, and removes an old one first.

What a store refuses becomes a StorageError that keeps the store's own words; what it may grant a little later
(`storage_retry.py`) is asked again for `patience_s`.
"""

from __future__ import annotations

import errno
import json
import os
import posixpath
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from botocore.exceptions import BotoCoreError, ClientError  # type: ignore[import-untyped]

from bitdistill_ray import env
from bitdistill_ray.errors import StorageError
from bitdistill_ray.storage_retry import patiently

Result = TypeVar("Result")
MANIFEST = ".complete.json"

LOCAL_PROTOCOLS = ("file", "local")
S3_PROTOCOLS = ("s3", "s3a")
# One try of botocore's, two of s3fs's: enough for a hiccup; longer patience is `storage_retry`'s, which says so.
S3_CLIENT = {"connect_timeout": 10, "retries": {"total_max_attempts": 1, "mode": "standard"}}
S3FS_TRIES = 2
PATIENCE_S = 120.0
TIMEOUT_S = 60.0

# What the words of a store mean: (any of these phrases in the error's text) -> (what, remedy).
NO_BUCKET = "no such bucket"
NO_SPACE = "Free some space, or choose another disk (BITDISTILL_CACHE for downloads, run.storage for runs)"
REFUSALS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (("nosuchbucket", "no_such_bucket", "bucket does not exist"), NO_BUCKET,
     "Create the bucket, or correct its name and the endpoint"),
    (("unable to locate credentials", "no credentials", "partial credentials"), "no credentials for this store",
     "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, attach a role, or set storage.anonymous=true"),
    (("accessdenied", "access_denied", "access denied", "forbidden", "invalidaccesskeyid", "signaturedoesnotmatch",
      "permission denied", "expiredtoken"), "access denied", "Check the credentials and that they may use this path"),
    (("could not connect", "connection refused", "network_connection", "name or service not known",
      "connect timeout", "connection was closed", "cannot connect", "connection attempts failed", "name resolution",
      "timed out", "offline mode"), "cannot reach the store",
     "Check the endpoint (storage.endpoint_url, AWS_ENDPOINT_URL) and the network"),
    (("entitytoolarge", "quotaexceeded", "no space left", "disk quota exceeded", "xminiostoragefull"),
     "no space left", NO_SPACE),
)  # fmt: skip


@contextmanager
def storage_errors(where: str) -> Iterator[None]:
    """Turn what a disk, an object store or pyarrow raises about `where` into a StorageError with its words."""
    try:
        yield
    except _client_errors() as error:
        words = _words(error)
        what, remedy = _refusal(error, words)
        raise StorageError(where, f"{what}: {words}", remedy) from error


def _client_errors() -> tuple[type[Exception], ...]:
    """What disks, S3 and those of fsspec's HTTP clients that were imported raise."""
    clients = (("aiohttp", "ClientError"), ("httpx", "HTTPError"), ("httpx2", "HTTPError"))
    loaded = [getattr(sys.modules[module], name) for module, name in clients if module in sys.modules]
    return (OSError, BotoCoreError, ClientError, *loaded)


def _words(error: BaseException) -> str:
    """The messages of an error and its causes, each once."""
    words: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        text = " ".join(str(cause).split()) or type(cause).__name__
        if not any(text in known for known in words):
            words.append(text)
        cause = cause.__cause__
    return "; ".join(words).rstrip(".")


def _refusal(error: BaseException, words: str) -> tuple[str, str]:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "no space left", NO_SPACE
    for phrases, what, remedy in REFUSALS:
        if any(phrase in words.lower() for phrase in phrases):
            return what, remedy
    if isinstance(error, PermissionError):
        return "access denied", "Check the permissions of this path"
    if isinstance(error, FileNotFoundError):
        return "does not exist", "Check the path"
    return "the store failed", "Try again; if it stays, check the store's health and your rights"


def _stamp(info: dict[str, Any]) -> str:
    etag = str(info.get("ETag") or info.get("blob_id") or "").strip('"')
    return f"{info['size']}:{etag}"


class Storage:
    """The folder at `url`: a local path, `file://`, `s3://bucket/prefix` or any other URL that fsspec knows.

    Paths given to the methods are relative to it, with forward slashes; "" is the folder itself.  Instances hold no
    connection and can be pickled.  `endpoint_url` (default: AWS_ENDPOINT_URL), `anonymous` and `region` apply to S3;
    credentials come from where S3 clients look for them.  `timeout_s` bounds one request's silence, `patience_s` all
    attempts at one operation together.

    Raises StorageError from every method: no such bucket, access denied, unreachable, no space left, not found.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        *,
        endpoint_url: str | None = None,
        anonymous: bool = False,
        region: str | None = None,
        patience_s: float = PATIENCE_S,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        text = os.fspath(url)
        protocol, separator, rest = text.partition("://")
        self.protocol = protocol if separator else "file"
        self.is_local = self.protocol in LOCAL_PROTOCOLS
        self.url = str(Path(rest if separator else text).expanduser().absolute()) if self.is_local else text.rstrip("/")
        self.endpoint_url = endpoint_url or (env.s3_endpoint_url() if self.protocol in S3_PROTOCOLS else None)
        self.anonymous, self.region = anonymous, region
        self.patience_s, self.timeout_s = patience_s, timeout_s

    def __repr__(self) -> str:
        return f"Storage({self.url!r})"

    def child(self, path: str) -> Storage:
        """The folder `path` below this one, with the same options."""
        return Storage(self.url_of(path), endpoint_url=self.endpoint_url, anonymous=self.anonymous, region=self.region,
                       patience_s=self.patience_s, timeout_s=self.timeout_s)  # fmt: skip

    def url_of(self, path: str) -> str:
        """The full URL (or local path) of a path."""
        return f"{self.url}/{path}" if path else self.url

    def _fs(self) -> Any:
        """fsspec's filesystem; fsspec keeps one per process, thread and options."""
        options: dict[str, Any] = {}
        if self.protocol in S3_PROTOCOLS:
            options = {"anon": self.anonymous, "endpoint_url": self.endpoint_url,
                       "config_kwargs": {**S3_CLIENT, "read_timeout": self.timeout_s},
                       "client_kwargs": {"region_name": self.region}, "use_listings_cache": False}  # fmt: skip
        try:
            filesystem = fsspec.filesystem(self.protocol, **options)
        except (ValueError, ImportError) as error:
            raise StorageError(self.url, str(error), "Use a local path or s3://, or install fsspec's driver") from error
        if self.protocol in S3_PROTOCOLS:
            filesystem.retries = S3FS_TRIES
        return filesystem

    def _patiently(self, action: Callable[[], Result], path: str) -> Result:
        """`action()`, tried again while the store is away; a local disk is not asked twice."""
        where = self.url_of(path)
        with storage_errors(where):
            return action() if self.is_local else patiently(action, where, patience_s=self.patience_s)

    def _key(self, path: str) -> str:
        """The path as fsspec's filesystem names it."""
        return str(self._fs()._strip_protocol(self.url_of(path)))

    def exists(self, path: str = "") -> bool:
        """True for a file, and for a folder with something in it (or an empty local one)."""

        def exists() -> bool:
            try:
                self._fs().info(self._key(path))
            except FileNotFoundError as error:
                if _refusal(error, _words(error))[0] == NO_BUCKET:
                    raise
                return False
            return True

        return self._patiently(exists, path)

    def list(self, prefix: str = "") -> list[str]:
        """All files below the folder `prefix`, sorted; paths relative to this storage.  Empty if there is none."""
        return sorted(self.stamps(prefix))

    def stamps(self, prefix: str = "") -> dict[str, str]:
        """What tells one version of each file below `prefix` from another: size, and the ETag where there is one."""
        key = self._key(prefix)
        found = self._patiently(lambda: self._fs().find(key, detail=True), prefix)
        stamps = {}
        for name, info in found.items():
            relative = posixpath.relpath(name, key)
            if relative in (".", MANIFEST) or name.endswith("/"):
                continue
            if ".." in relative.split("/"):
                raise StorageError(self.url_of(prefix), f"holds an object named {name!r}", "Rename or delete it")
            stamps[posixpath.join(prefix, relative)] = _stamp(info)
        return stamps

    def stamp(self) -> str:
        """The stamp of the one file that this is, without listing anything."""
        return self._patiently(lambda: _stamp(self._fs().info(self._key(""))), "")

    def read_bytes(self, path: str) -> bytes:
        """The content of a file."""
        return self._patiently(lambda: bytes(self._fs().cat_file(self._key(path))), path)

    def download_file(self, path: str, local: str | os.PathLike[str]) -> None:
        """Copy one file to a local path, which appears whole or not at all."""
        target = Path(local)
        temporary = temporary_sibling(target)
        try:
            with storage_errors(self.url_of(path)):
                target.parent.mkdir(parents=True, exist_ok=True)
            self._patiently(lambda: self._fs().get_file(self._key(path), str(temporary)), path)
            with storage_errors(str(target)):
                os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)

    def write_bytes(self, path: str, content: bytes) -> None:
        """Write or replace a file; a reader, or a crash, sees the old content or the new, nothing between."""
        if not self.is_local:
            self._patiently(lambda: self._fs().pipe_file(self._key(path), content), path)
            return
        with storage_errors(self.url_of(path)):
            target = Path(self._key(path))
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = temporary_sibling(target)
            try:
                with temporary.open("xb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, target)
            finally:
                temporary.unlink(missing_ok=True)

    def delete(self, path: str) -> None:
        """Remove a file or a folder with all in it; nothing happens where there is none."""

        def delete() -> None:
            with suppress(FileNotFoundError):
                self._fs().rm(self._key(path), recursive=True)

        self._patiently(delete, path)

    def upload_folder(self, local: str | os.PathLike[str], path: str = "") -> None:
        """Copy a local folder to `path`, replacing files of the same name; the manifest is written last."""
        source = Path(local)
        with storage_errors(str(source)):
            sizes = {
                file.relative_to(source).as_posix(): file.stat().st_size
                for file in sorted(source.rglob("*"))
                if file.is_file() and file.name != MANIFEST
            }
        if not sizes:
            raise StorageError(str(source), "no file to upload", "Check the folder")
        self.delete(posixpath.join(path, MANIFEST))
        with storage_errors(self.url_of(path)):
            targets = [self._key(posixpath.join(path, name)) for name in sizes]
            if self.is_local:
                for folder in {posixpath.dirname(target) for target in targets}:
                    os.makedirs(folder, exist_ok=True)
        self._patiently(lambda: self._fs().put([str(source / name) for name in sizes], targets), path)
        self.write_bytes(posixpath.join(path, MANIFEST), json.dumps({"files": sizes}, indent=1).encode())

    def is_complete(self, path: str = "") -> bool:
        """True where `upload_folder` came to its end and every file still has its size."""
        manifest = posixpath.join(path, MANIFEST)
        if not self.exists(manifest):
            return False
        sizes = json.loads(self.read_bytes(manifest))["files"]
        present = {posixpath.relpath(name, path or "."): stamp for name, stamp in self.stamps(path).items()}
        return all(present.get(name, "").startswith(f"{size}:") for name, size in sizes.items())

    def download_folder(self, path: str, local: str | os.PathLike[str], *, complete: bool = False) -> None:
        """Copy the folder `path` to a local one, which appears whole or not at all and replaces what was there.

        `complete` insists on the manifest of `upload_folder`, and copies what the manifest names; without it all files
        are copied.
        """
        if complete and not self.is_complete(path):
            raise StorageError(self.url_of(path), "an upload that was never finished", "Delete it, or upload it again")
        if complete:
            names = sorted(json.loads(self.read_bytes(posixpath.join(path, MANIFEST)))["files"])
        else:
            names = [posixpath.relpath(name, path or ".") for name in self.list(path)]
        if not names:
            raise StorageError(self.url_of(path), "no such folder, or nothing in it", "Check the URL and its prefix")
        target = Path(local)
        with storage_errors(str(target)):
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = temporary_sibling(target)
        try:
            with storage_errors(self.url_of(path)):
                for folder in {(temporary / name).parent for name in names}:
                    folder.mkdir(parents=True, exist_ok=True)
            sources, copies = [self._key(posixpath.join(path, n)) for n in names], [str(temporary / n) for n in names]
            self._patiently(lambda: self._fs().get(sources, copies), path)
            with storage_errors(str(target)):
                replace_folder(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def arrow_filesystem(self) -> tuple[Any, str]:
        """(pyarrow filesystem, path of this folder in it), for pyarrow's readers and Ray; use in `storage_errors`."""
        from pyarrow import fs

        with storage_errors(self.url):
            if self.is_local:
                return fs.LocalFileSystem(), self.url
            if self.protocol in S3_PROTOCOLS:
                options = {"endpoint_override": self.endpoint_url, "region": self.region, "anonymous": self.anonymous}
                s3 = fs.S3FileSystem(**{name: option for name, option in options.items() if option}, connect_timeout=10,
                                     request_timeout=self.timeout_s)  # fmt: skip
                return s3, self._key("")
            return fs.PyFileSystem(fs.FSSpecHandler(self._fs())), self._key("")


def temporary_sibling(target: Path) -> Path:
    """A hidden, unused name beside `target`, from which a rename into place is atomic."""
    return target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}")


def replace_folder(new: Path, target: Path) -> None:
    """Put the folder `new` in the place of `target` by renaming (both on one filesystem); an old target is removed."""
    if target.exists():
        old = temporary_sibling(target)
        target.rename(old)
        new.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        new.rename(target)


def write_json(url: str, content: Any) -> None:
    """Write `content` as the JSON file `url`: a path or any URL.  Raises StorageError."""
    folder, slash, name = url.rpartition("/")
    Storage(folder or slash or ".").write_bytes(name, json.dumps(content, indent=1).encode())
