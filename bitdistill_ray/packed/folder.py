"""The packed student folder: written whole or not at all, and believed only after its checksums.

    model.safetensors   NAME.codes (or .trits), .scales, .zeros of every packed matrix; the rest under its own name
    config.json         the Hugging Face config, and the manifest under the key `bitdistill` (see packed.manifest)
    provenance.json     teacher, recipe, data, commit, metrics: whatever the exporter knows
    ...                 tokenizer files and the generation config

Opening checks that every file is there with its checksum and that the safetensors header promises exactly the tensors
of the manifest.  A tensor's own checksum is checked when it is read, before anyone sees it; it is read through a
memory map, so that a student larger than memory can be opened, inspected and loaded part by part.  The same content
always gives the same bytes.  `docs/FORMAT.md` is the specification.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from torch import Tensor

from bitdistill_ray.core import PackedWeight
from bitdistill_ray.errors import PackedError
from bitdistill_ray.packed.manifest import (
    COPY_AGAIN,
    KEY,
    Layout,
    Manifest,
    PackedEntry,
    StoredDtype,
    StoredTensor,
    bytes_of,
    expected_parts,
    parts_of,
    weight_of,
)
from bitdistill_ray.packed.weight import check_packed
from bitdistill_ray.storage import replace_folder, storage_errors, temporary_sibling

CONFIG, TENSORS, PROVENANCE = "config.json", "model.safetensors", "provenance.json"
ALIGNMENT = 64  # bytes at which the first tensor starts
LINES_TO_DEPTH = 2  # config.json / bitdistill / tensors: deeper objects are one line


class PackedFolder:
    """An opened packed student: `config` (Hugging Face), `manifest`, and its tensors on request."""

    def __init__(self, path: Path, config: dict[str, Any], manifest: Manifest) -> None:
        self.path, self.config, self.manifest = path, config, manifest
        self._file = _open_tensors(path / TENSORS)
        self._check_header()

    @staticmethod
    def is_packed(path: str | os.PathLike[str]) -> bool:
        """True where `path` is a folder whose config.json has a manifest (which may yet turn out damaged)."""
        config = Path(path) / CONFIG
        return config.is_file() and f'"{KEY}"'.encode() in config.read_bytes()

    @classmethod
    def write(
        cls,
        path: str | os.PathLike[str],
        *,
        config: Mapping[str, Any],
        packed: Mapping[str, PackedWeight],
        tensors: Mapping[str, Tensor],
        files: Mapping[str, bytes],
        provenance: Mapping[str, Any],
        vocabulary: str,
        subln: Mapping[str, float] | None = None,
        ternary: Layout = Layout.PLANES,
    ) -> Self:
        """Write a folder beside `path`, then rename it into place; what was at `path` is replaced.

        `packed` by module path, `tensors` (fp16, bf16 or fp32) by Hugging Face name, `files` as they are,
        `subln` eps by module path; `ternary` is the layout of codes that are one of three.
        Raises StorageError where the disk refuses (nothing is left behind), PackedError for what cannot be stored.
        """
        target = Path(path).absolute()
        entries = {name: PackedEntry.of(weight, ternary) for name, weight in packed.items()}
        stored = dict(_flatten(packed, entries, tensors))
        files = {**files, PROVENANCE: _json(provenance)}
        manifest = Manifest(
            packed=entries,
            tensors={name: StoredTensor.of(tensor) for name, tensor in stored.items()},
            subln=subln or {},
            files={name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
            vocabulary=vocabulary,
        )
        config_text = _json(manifest.seal(config))
        Manifest.parse(config_text, str(target / CONFIG))  # never write what could not be read
        temporary = temporary_sibling(target)
        try:
            with storage_errors(str(target)):
                for name, content in {**files, CONFIG: config_text}.items():
                    _write(temporary / name, [content])
                _write(temporary / TENSORS, _safetensors(stored))
                replace_folder(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return cls.open(target)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Open a folder and check all but the tensors' own bytes.

        Raises PackedError, naming file and tensor, and StorageError where the disk refuses.
        """
        folder = Path(path)
        config, manifest = Manifest.parse(_read(folder / CONFIG), str(folder / CONFIG))
        for name, sha256 in manifest.files.items():
            if hashlib.sha256(_read(folder / name)).hexdigest() != sha256:
                raise PackedError(str(folder / name), "does not have the checksum it was written with", COPY_AGAIN)
        return cls(folder, config, manifest)

    @property
    def provenance(self) -> dict[str, Any]:
        """Where the student comes from."""
        found: dict[str, Any] = json.loads(_read(self.path / PROVENANCE))
        return found

    @property
    def plain_names(self) -> list[str]:
        """Names of the tensors that are not parts of packed matrices, sorted."""
        parts = {f"{name}.{part}" for name, entry in self.manifest.packed.items() for part in expected_parts(entry)}
        return sorted(set(self.manifest.tensors) - parts)

    def weight(self, name: str) -> PackedWeight:
        """The packed matrix of the linear `name`.  Raises PackedError where its bytes are not those written."""
        entry = self.manifest.packed[name]
        parts = {part: self.tensor(f"{name}.{part}") for part in expected_parts(entry)}
        weight = weight_of(entry, parts)
        check_packed(weight, f"{self.path / TENSORS}:{name}")
        return weight

    def tensor(self, name: str) -> Tensor:
        """One stored tensor, checked.  Raises PackedError where its bytes are not those written."""
        where = f"{self.path / TENSORS}:{name}"
        try:
            tensor: Tensor = self._file.get_tensor(name)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise PackedError(where, f"cannot be read ({error})", COPY_AGAIN) from error
        if hashlib.sha256(bytes_of(tensor)).hexdigest() != self.manifest.tensors[name].sha256:
            raise PackedError(where, "does not have the checksum it was written with", COPY_AGAIN)
        return tensor

    def verify(self) -> None:
        """Read and check every tensor.  Raises PackedError for the first that is not what was written."""
        for name in sorted(self.manifest.tensors):
            self.tensor(name)

    def _check_header(self) -> None:
        where, wanted = str(self.path / TENSORS), self.manifest.tensors
        names = set(self._file.keys())
        if missing := sorted(set(wanted) - names):
            raise PackedError(f"{where}:{missing[0]}", "is missing", COPY_AGAIN)
        if extra := sorted(names - set(wanted)):
            raise PackedError(f"{where}:{extra[0]}", f"is not in the manifest of {CONFIG}", COPY_AGAIN)
        for name, stored in wanted.items():
            header = self._file.get_slice(name)
            found = f"{header.get_dtype()} {list(header.get_shape())}"
            if found != f"{stored.dtype} {list(stored.shape)}":
                raise PackedError(f"{where}:{name}", f"{found}, not {stored.dtype} {list(stored.shape)}", COPY_AGAIN)


def _flatten(
    packed: Mapping[str, PackedWeight], entries: Mapping[str, PackedEntry], tensors: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor to store, by its stored name, contiguous on the CPU.  Raises PackedError for a name given twice."""
    for name, weight in packed.items():
        check_packed(weight, name)
        for part, tensor in parts_of(weight, entries[name].layout).items():
            if f"{name}.{part}" in tensors:
                raise PackedError(f"{name}.{part}", "names a packed and a plain tensor", "Rename the plain one")
            yield f"{name}.{part}", tensor.detach().cpu().contiguous()
    for name, tensor in tensors.items():
        yield name, tensor.detach().cpu().contiguous()


def _safetensors(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The content of a safetensors file, piece by piece: wide dtypes first, so that every tensor is aligned.

    (The library's own writer holds a second copy of all tensors, and hides a full disk among its format errors.)
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        tensor, start = tensors[name], end
        end += tensor.nbytes
        dtype = StoredDtype.of(tensor.dtype).value
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    yield len(text).to_bytes(8, "little")
    yield text
    for name in names:
        yield bytes_of(tensors[name])


def _open_tensors(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise PackedError(str(path), f"is no complete safetensors file ({error})", COPY_AGAIN) from error


def _read(path: Path) -> bytes:
    with storage_errors(str(path)):  # a forged manifest may name what no disk takes
        if path.is_file():
            return path.read_bytes()
    raise PackedError(str(path), "is missing", "Give the folder of a packed student, or export it again")


def _write(path: Path, pieces: Iterator[bytes | memoryview] | list[bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as file:
        for piece in pieces:
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())


def _json(content: Any, depth: int = 0) -> bytes:
    """JSON in the order given, with one line for each entry of the manifest."""
    if not isinstance(content, Mapping) or not content or depth > LINES_TO_DEPTH:
        return json.dumps(content, ensure_ascii=False).encode()
    indent = b"\n" + b" " * depth
    entries = (json.dumps(key).encode() + b": " + _json(value, depth + 1) for key, value in content.items())
    return b"{" + indent + b" " + (b"," + indent + b" ").join(entries) + indent + b"}" + (b"" if depth else b"\n")
