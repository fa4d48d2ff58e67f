"""The manifest of a packed student: what its folder must hold, tensor by tensor and file by file.

It is the value of the key `bitdistill` in the folder's `config.json`, beside the Hugging Face config:

    format_version   the oldest one whose readers know all that the folder holds: 1, or 2 (int4, int8, trits)
    packed           NAME -> {"spec": QuantSpec, "shape": [N, K]}   NAME is the path of a linear or embedding module;
                     and "layout": "trits" where the codes are stored five to a byte
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

from bitdistill_ray.core import Format, PackedWeight, QuantSpec
from bitdistill_ray.errors import ConfigError, PackedError
from bitdistill_ray.packed.bits import pack_codes, unpack_codes
from bitdistill_ray.packed.trits import pack_trits, trit_row_bytes, unpack_trits
from bitdistill_ray.packed.weight import SCALE_DTYPES, packed_shapes

FORMAT_VERSION = 2
SINCE_VERSION_2 = frozenset({Format.INT4, Format.INT8})
KEY = "bitdistill"
CHECKSUM = "sha256"
TERNARY_CODES, TRIT_BITS = 3, 1.6
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


class Layout(StrEnum):
    """How a file stores the codes of a matrix."""

    PLANES = "planes"  # as kernels take them: `packed.bits`
    TRITS = "trits"  # five ternary codes a byte: `packed.trits`


@dataclass(frozen=True, slots=True)
class PackedEntry:
    """One packed [N, K] matrix."""

    spec: QuantSpec
    shape: tuple[int, int]
    layout: Layout = Layout.PLANES

    @classmethod
    def of(cls, weight: PackedWeight, ternary: Layout) -> PackedEntry:
        """The entry of a packed weight; `ternary` is the layout of matrices of three codes."""
        three = weight.spec.format.code_count == TERNARY_CODES
        return cls(weight.spec, weight.shape, ternary if three else Layout.PLANES)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits: codes, scales and zero points, no padding."""
        bits = self.spec.bits_per_weight(*self.shape)
        return bits if self.layout is Layout.PLANES else bits - self.spec.format.code_bits + TRIT_BITS

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        layout = {} if self.layout is Layout.PLANES else {"layout": self.layout.value}
        return {"spec": self.spec.to_dict(), "shape": list(self.shape), **layout}


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """See the module; `seal` and `parse` turn it into the content of config.json and back."""

    packed: Mapping[str, PackedEntry]
    tensors: Mapping[str, StoredTensor]
    subln: Mapping[str, float]
    files: Mapping[str, str]
    vocabulary: str

    @property
    def format_version(self) -> int:
        """The oldest one whose readers know all that this holds."""
        entries = self.packed.values()
        later = any(e.layout is not Layout.PLANES or e.spec.format in SINCE_VERSION_2 for e in entries)
        return 2 if later else 1

    def seal(self, hf_config: Mapping[str, Any]) -> dict[str, Any]:
        """The content of config.json: the Hugging Face config, this manifest, and the checksum over both."""
        own: dict[str, Any] = {
            "format_version": self.format_version,
            "packed": {n: e.to_dict() for n, e in sorted(self.packed.items())},
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


def parts_of(weight: PackedWeight, layout: Layout) -> dict[str, Tensor]:
    """The stored tensors of a packed matrix, by the last part of their names."""
    codes = {"codes": weight.codes}
    if layout is Layout.TRITS:
        codes = {"trits": pack_trits(unpack_codes(weight.codes, weight.shape[1], weight.spec.format.code_bits))}
    return {**codes, "scales": weight.scales} | ({} if weight.zeros is None else {"zeros": weight.zeros})


def weight_of(entry: PackedEntry, parts: Mapping[str, Tensor]) -> PackedWeight:
    """The packed matrix of its stored tensors.  Raises PackedError for bytes that are no trits."""
    codes = parts.get("codes")
    if codes is None:
        codes = pack_codes(unpack_trits(parts["trits"], entry.shape[1]), entry.spec.format.code_bits)
    return PackedWeight(
        spec=entry.spec, shape=entry.shape, codes=codes, scales=parts["scales"], zeros=parts.get("zeros")
    )


def expected_parts(entry: PackedEntry) -> dict[str, tuple[StoredDtype, tuple[int, ...]]]:
    """Dtype and shape that each stored tensor of a packed matrix must have."""
    shapes = packed_shapes(entry.spec, entry.shape)
    scale_dtype = StoredDtype.of(SCALE_DTYPES[entry.spec.scale_dtype])
    codes = {"codes": (StoredDtype.U8, shapes.codes)}
    if entry.layout is Layout.TRITS:
        codes = {"trits": (StoredDtype.U8, (entry.shape[0], trit_row_bytes(entry.shape[1])))}
    parts = {**codes, "scales": (scale_dtype, shapes.scales)}
    return parts if shapes.zeros is None else {**parts, "zeros": (StoredDtype.U8, shapes.zeros)}


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, without a copy (little-endian, as safetensors stores them)."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def _entry(raw: dict[str, Any]) -> PackedEntry:
    out_features, in_features = _shape(raw["shape"])
    spec, layout = QuantSpec.from_dict(raw["spec"]), Layout(raw.get("layout", Layout.PLANES))
    if layout is Layout.TRITS and spec.format.code_count != TERNARY_CODES:
        raise ValueError(f"{spec.format} in trits")
    return PackedEntry(spec, (out_features, in_features), layout)


def _stored(raw: dict[str, Any]) -> StoredTensor:
    return StoredTensor(StoredDtype(raw["dtype"]), _shape(raw["shape"]), str(raw["sha256"]))


def _shape(raw: list[Any]) -> tuple[int, ...]:
    if not all(type(size) is int and size >= 0 for size in raw):
        raise ValueError(f"shape {raw}")
    return tuple(raw)


def _canonical_hash(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
