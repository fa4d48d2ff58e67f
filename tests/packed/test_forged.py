"""Students by somebody who knows how checksums are made: whatever manifest and header say, they get a clear refusal."""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitdistill_kernels import Weight
from bitdistill_ray.errors import BitdistillError
from bitdistill_ray.packed.folder import CONFIG, TENSORS, PackedFolder
from bitdistill_ray.packed.manifest import CHECKSUM, KEY
from bitdistill_ray.packed.module import kernel_weight
from tests.packed.test_folder import write

SMALL = [-1, 0, 1, 2, 3, 7, 8, 9, 16, 17, 64, 127, 128, 255, 256, 65_536]
LARGE = [2**31 - 1, 2**31, 2**53, 2**63 - 1, 2**63, 2**64]
WORDS = ["", "U8", "F16", "F32", "BF16", "I64", "group", "tensor", "row", "nf3", "int2", "int3", "ternary", "trits",
         "planes", "a.proj.codes", "../config.json", "/etc/passwd", "\0", "\ud800", "é" * 300]  # fmt: skip


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("forged") / "student").path


def test_what_is_only_sealed_again_is_read(original: Path) -> None:
    """So it is not for their checksums that the others are refused."""
    config, header, body = taken_apart(original)
    body = bytes([body[0] ^ 1]) + body[1:]  # a bit of a scale
    read(sealed(original, config, header, body))


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_what_is_forged_is_refused_or_read_within_its_file(original: Path, data: st.DataObject) -> None:
    forge_and_read(original, data)


@pytest.mark.soak
@given(st.data())
@settings(max_examples=250_000, deadline=None)
def test_nothing_that_is_forged_gets_through(original: Path, data: st.DataObject) -> None:
    """The same for more than ten minutes."""
    forge_and_read(original, data)


def forge_and_read(original: Path, data: st.DataObject) -> None:
    """Some values of the manifest and the header are others, and all checksums right again."""
    config, header, body = taken_apart(original)
    for _ in range(data.draw(st.integers(1, 3))):
        change(data, config[KEY] if data.draw(st.booleans()) else header)
    length = data.draw(st.sampled_from([0] * 8 + [-1, 1, 2**40, 2**62]))
    student = sealed(original, config, header, body, longer=length)
    with suppress(BitdistillError):
        read(student)


def taken_apart(student: Path) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """The config with its manifest, the header of the tensors, and their bytes."""
    raw = (student / TENSORS).read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    return json.loads((student / CONFIG).read_text()), json.loads(raw[8:end]), raw[end:]


def sealed(original: Path, config: dict[str, Any], header: dict[str, Any], body: bytes, *, longer: int = 0) -> Path:
    """A copy of `original` with these, whose checksums are right; its header says that it is `longer`."""
    student = original.parent / "student-forged"
    shutil.rmtree(student, ignore_errors=True)
    shutil.copytree(original, student)
    raw = json.dumps(header).encode()
    (student / TENSORS).write_bytes((len(raw) + longer).to_bytes(8, "little") + raw + body)
    own = config[KEY]
    with suppress(KeyError, TypeError, ValueError, AttributeError):  # what is no manifest any more has no sums to mend
        for name, stored in own["tensors"].items():
            start, end = header[name]["data_offsets"]
            stored["sha256"] = hashlib.sha256(body[start:end]).hexdigest()
    own.pop(CHECKSUM, None)
    canonical = json.dumps(config, sort_keys=True, separators=(",", ":")).encode()
    own[CHECKSUM] = hashlib.sha256(canonical).hexdigest()
    (student / CONFIG).write_text(json.dumps(config))
    return student


def read(student: Path) -> None:
    """Everything, as far as the kernels' own copies."""
    folder = PackedFolder.open(student)
    folder.verify()
    for name in folder.plain_names:
        folder.tensor(name)
    for name in folder.manifest.packed:
        assert isinstance(kernel_weight(folder.weight(name)), Weight)


def change(data: st.DataObject, tree: dict[str, Any]) -> None:
    """Put another value, or none, in one place of `tree`."""
    found = list(places(tree))
    if not found:
        return
    container, key = data.draw(st.sampled_from(found))
    value = container[key]
    near = [value + 1, value - 1, 2 * value, -value] if type(value) is int else []
    values = st.sampled_from([*near, *SMALL, *LARGE, 0.5, 1e300, float("nan"), None, True, [], {}, [1, 2, 3], *WORDS])
    if isinstance(container, dict) and data.draw(st.integers(0, 9)) == 0:
        del container[key]
    elif isinstance(container, dict) and data.draw(st.integers(0, 9)) == 0:
        container[data.draw(st.sampled_from(WORDS))] = container.pop(key)
    else:
        container[key] = data.draw(values)


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Every place in it that holds a value."""
    keys = list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    return [place for key in keys for place in [(tree, key), *places(tree[key])]]
