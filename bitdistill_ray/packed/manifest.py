"""The manifest of a packed student: what its folder must hold, tensor by tensor and file by file.

It is the value of the key `bitdistill` in the folder's `config.json`, beside the Hugging Face config:

    format_version   1
    packed           NAME -> {"spec": QuantSpec, "shape": [N, K]}   NAME is the path of a linear module
    tensors          stored name -> {"dtype", "shape", "sha256"}    every tensor of model.safetensors
    subln            NAME -> eps of each linear that normalises its input; `NAME.norm.weight` is the gain
    files            file name -> sha256                            every other file: tokenizer, provenance, ...
    vocabulary       sha256 that the tokenizer must have (`vocabulary_hash`)
    sha256           of the canonical JSON of all of config.json but this key

So each byte that decides what the model computes is under a checksum: tensors and files directly, the config through
its canonical JSON (sorted keys, no spaces).  Reformatting config.json by hand is allowed; changing it is not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from bitdistill_ray.core import PackedWeight, QuantSpec
from bitdistill_ray.errors import ConfigError, PackedError
from bitdistill_ray.packed.weight import SCALE_DTYPES, packed_shapes

FORMAT_VERSION = 1
KEY = "bitdistill"
CHECKSUM = "sha256"
COPY_AGAIN = "The folder is damaged or was changed: copy it again, or export it again"


class StoredDtype(StrEnum):
    """The dtypes of stored tensors, by their safetensors names."""

    U8 = "U8"
    F16 = "F16"
    BF16 = "BF16"
    F32 = "F32"

    @property
    def itemsize(self) -> int:
        """Bytes of one value."""
        return _TORCH_DTYPES[self].itemsize

    @classmethod
    def of(cls, dtype: torch.dtype) -> StoredDtype:
        """The name of a torch dtype.  Raises PackedError for one that a folder does not store."""
        for stored, known in _TORCH_DTYPES.items():
            if known is dtype:
                return stored
        raise PackedError("packed student", f"a tensor of {dtype}", f"Store one of {', '.join(cls)}")


_TORCH_DTYPES = {
    StoredDtype.U8: torch.uint8,
    StoredDtype.F16: torch.float16,
    StoredDtype.BF16: torch.bfloat16,
    StoredDtype.F32: torch.float32,
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of model.safetensors."""

    dtype: StoredDtype
    shape: tuple[int, ...]
    sha256: str

    @classmethod
    def of(cls, tensor: Tensor) -> StoredTensor:
        """The entry of a contiguous tensor, with the checksum of its bytes."""
        return cls(StoredDtype.of(tensor.dtype), tuple(tensor.shape), hashlib.sha256(bytes_of(tensor)).hexdigest())


@dataclass(frozen=True, slots=True)
class PackedEntry:
    """One packed [N, K] matrix."""

    spec: QuantSpec
    shape: tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """See the module; `seal` and `parse` turn it into the content of config.json and back."""

    packed: Mapping[str, PackedEntry]
    tensors: Mapping[str, StoredTensor]
    subln: Mapping[str, float]
    files: Mapping[str, str]
    vocabulary: str

    def seal(self, hf_config: Mapping[str, Any]) -> dict[str, Any]:
        """The content of config.json: the Hugging Face config, this manifest, and the checksum over both."""
        own: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "packed": {n: {"spec": e.spec.to_dict(), "shape": list(e.shape)} for n, e in sorted(self.packed.items())},
            "tensors": {n: asdict(t) | {"shape": list(t.shape)} for n, t in sorted(self.tensors.items())},
            "subln": dict(sorted(self.subln.items())),
            "files": dict(sorted(self.files.items())),
            "vocabulary": self.vocabulary,
        }
        content = {**hf_config, KEY: own}
        own[CHECKSUM] = _canonical_hash(content)
        return content

    @classmethod
    def parse(cls, text: bytes, where: str) -> tuple[dict[str, Any], Manifest]:
        """(Hugging Face config, manifest) of the bytes of a config.json.

        Raises PackedError: not JSON, not a packed student, of a newer version, changed since it was written, or with
        packed matrices whose tensors are not those of their spec.
        """
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise PackedError(where, f"is not JSON ({error})", COPY_AGAIN) from error
        own = content.get(KEY) if isinstance(content, dict) else None
        if not isinstance(own, dict):
            raise PackedError(where, f"has no key {KEY!r}, so it is not a packed student",
                              "Give a folder that `bitdistill export` wrote")  # fmt: skip
        version = own.get("format_version")
        if not isinstance(version, int) or version < 1:
            raise PackedError(where, f"format version {version!r}", COPY_AGAIN)
        if version > FORMAT_VERSION:
            what = f"is of format version {version}, and this bitdistill-ray reads up to {FORMAT_VERSION}"
            raise PackedError(where, what, "Update bitdistill-ray, or export the student again with this one")
        checksum = own.pop(CHECKSUM, None)
        if checksum != _canonical_hash(content):
            raise PackedError(where, "does not have the checksum it was written with", COPY_AGAIN)
        try:
            manifest = cls(
                packed={n: _entry(e) for n, e in own["packed"].items()},
                tensors={n: _stored(t) for n, t in own["tensors"].items()},
                subln={name: float(eps) for name, eps in own["subln"].items()},
                files=dict(own["files"]),
                vocabulary=str(own["vocabulary"]),
            )
        except (ConfigError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise PackedError(f"{where}:{KEY}", f"cannot be read ({error!r})", COPY_AGAIN) from error
        manifest._check(where)
        del content[KEY]
        return content, manifest

    def _check(self, where: str) -> None:
        """The packed matrices and the stored tensors must fit together, and no file lie outside the folder."""
        for name, entry in self.packed.items():
            for part, (dtype, shape) in expected_parts(entry).items():
                stored = self.tensors.get(f"{name}.{part}")
                if stored is None or (stored.dtype, stored.shape) != (dtype, shape):
                    found = "missing" if stored is None else f"{stored.dtype} {list(stored.shape)}"
                    raise PackedError(f"{where}:{name}.{part}", f"{found}, not {dtype} {list(shape)}", COPY_AGAIN)
        for name in self.subln:
            has_linear = name in self.packed or f"{name}.weight" in self.tensors
            if not has_linear or f"{name}.norm.weight" not in self.tensors:
                raise PackedError(f"{where}:{name}", "a SubLN norm without its linear or its gain", COPY_AGAIN)
        for file in self.files:
            if "\\" in file or not {"", ".", ".."}.isdisjoint(file.split("/")):
                raise PackedError(where, f"names the file {file!r}", COPY_AGAIN)


def parts_of(weight: PackedWeight) -> dict[str, Tensor]:
    """The stored tensors of a packed matrix, by the last part of their names."""
    parts = {"codes": weight.codes, "scales": weight.scales}
    return parts if weight.zeros is None else {**parts, "zeros": weight.zeros}


def expected_parts(entry: PackedEntry) -> dict[str, tuple[StoredDtype, tuple[int, ...]]]:
    """Dtype and shape that each stored tensor of a packed matrix must have."""
    shapes = packed_shapes(entry.spec, entry.shape)
    scale_dtype = StoredDtype.of(SCALE_DTYPES[entry.spec.scale_dtype])
    parts = {"codes": (StoredDtype.U8, shapes.codes), "scales": (scale_dtype, shapes.scales)}
    return parts if shapes.zeros is None else {**parts, "zeros": (StoredDtype.U8, shapes.zeros)}


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, without a copy (little-endian, as safetensors stores them)."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def _entry(raw: dict[str, Any]) -> PackedEntry:
    out_features, in_features = _shape(raw["shape"])
    return PackedEntry(QuantSpec.from_dict(raw["spec"]), (out_features, in_features))


def _stored(raw: dict[str, Any]) -> StoredTensor:
    return StoredTensor(StoredDtype(raw["dtype"]), _shape(raw["shape"]), str(raw["sha256"]))


def _shape(raw: list[Any]) -> tuple[int, ...]:
    if not all(type(size) is int and size >= 0 for size in raw):
        raise ValueError(f"shape {raw}")
    return tuple(raw)


def _canonical_hash(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
