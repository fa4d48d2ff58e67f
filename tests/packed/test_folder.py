"""The packed folder: what is written comes back, and nothing else ever does."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from bitdistill_ray.core import Format, Granularity, PackedWeight, QuantSpec
from bitdistill_ray.errors import PackedError, StorageError
from bitdistill_ray.packed.folder import CONFIG, PROVENANCE, TENSORS, PackedFolder
from bitdistill_ray.packed.manifest import FORMAT_VERSION, KEY, Layout
from bitdistill_ray.packed.weight import pack
from bitdistill_ray.quant import quantize

INT3 = QuantSpec(format=Format.INT3, group_size=8)
TERNARY = QuantSpec(format=Format.TERNARY, granularity=Granularity.TENSOR, group_size=None, activation_bits=8)


def packed_weights() -> dict[str, PackedWeight]:
    generator = torch.Generator().manual_seed(1)
    return {
        "a.proj": pack(quantize(torch.randn(3, 21, generator=generator), INT3)),
        "b.proj": pack(quantize(torch.randn(4, 9, generator=generator), TERNARY)),
    }


def write(path: Path, ternary: Layout = Layout.PLANES) -> PackedFolder:
    return PackedFolder.write(
        path,
        config={"model_type": "llama", "rms_norm_eps": 1e-05, "name": "tiny é"},
        packed=packed_weights(),
        tensors={
            "embed.weight": torch.arange(12.0).reshape(3, 4).bfloat16(),
            "b.proj.norm.weight": torch.ones(9).half(),
        },
        files={"tokenizer.json": b'{"model": {}}', "chat/template.jinja": b"{{ messages }}"},
        provenance={"teacher": "a teacher", "metrics": {"ppl:wiki": 12.5}},
        vocabulary="abc",
        subln={"b.proj": 1e-6},
        ternary=ternary,
    )


Content = tuple[dict[str, Any], dict[str, Any], dict[str, tuple[str, tuple[int, ...], bytes]]]


def content(path: Path) -> Content:
    """Everything that a reader gets out of a folder."""
    folder = PackedFolder.open(path)
    tensors = {name: folder.tensor(name) for name in folder.plain_names}
    for name in folder.manifest.packed:
        weight = folder.weight(name)
        tensors |= {f"{name}.codes": weight.codes, f"{name}.scales": weight.scales}
        tensors |= {} if weight.zeros is None else {f"{name}.zeros": weight.zeros}
        tensors[f"{name}.spec"] = torch.tensor(list(json.dumps(weight.spec.to_dict()).encode()))
    found = {
        n: (str(t.dtype), tuple(t.shape), t.contiguous().view(torch.uint8).numpy().tobytes())
        for n, t in tensors.items()
    }
    return {**folder.config, "subln": folder.manifest.subln}, folder.provenance, found


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("packed") / "student").path


def test_what_is_written_comes_back(original: Path) -> None:
    folder = PackedFolder.open(original)
    for name, weight in packed_weights().items():
        read = folder.weight(name)
        assert (read.spec, read.shape) == (weight.spec, weight.shape)
        assert torch.equal(read.codes, weight.codes)
        assert torch.equal(read.scales, weight.scales)
        assert (read.zeros is None) == (weight.zeros is None)
        assert read.zeros is None or (weight.zeros is not None and torch.equal(read.zeros, weight.zeros))
    assert folder.plain_names == ["b.proj.norm.weight", "embed.weight"]
    assert folder.tensor("embed.weight").dtype is torch.bfloat16
    assert folder.config == {"model_type": "llama", "rms_norm_eps": 1e-05, "name": "tiny é"}
    assert folder.provenance["metrics"] == {"ppl:wiki": 12.5}
    assert folder.manifest.subln == {"b.proj": 1e-6}
    folder.verify()
    assert PackedFolder.is_packed(original)
    assert not PackedFolder.is_packed(original.parent)


def test_the_same_content_gives_the_same_bytes(original: Path, tmp_path: Path) -> None:
    again = write(tmp_path / "again").path
    for file in (CONFIG, TENSORS, PROVENANCE, "tokenizer.json", "chat/template.jinja"):
        assert (again / file).read_bytes() == (original / file).read_bytes()


def test_other_programs_read_its_safetensors(original: Path) -> None:
    """The library's own loader: the file is an ordinary safetensors file, aligned for memory maps."""
    tensors = load_file(original / TENSORS)
    assert torch.equal(tensors["a.proj.codes"], packed_weights()["a.proj"].codes)
    head = int.from_bytes((original / TENSORS).read_bytes()[:8], "little")
    assert (8 + head) % 64 == 0


def test_config_may_be_reformatted_but_not_changed(original: Path, tmp_path: Path) -> None:
    student = Path(shutil.copytree(original, tmp_path / "student"))
    config = json.loads((student / CONFIG).read_text())
    (student / CONFIG).write_text(json.dumps(dict(reversed(config.items())), indent=7))
    assert content(student) == content(original)
    (student / CONFIG).write_text(json.dumps({**config, "rms_norm_eps": 1e-04}))
    with pytest.raises(PackedError, match=r"config\.json: does not have the checksum"):
        PackedFolder.open(student)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_any_damage_is_refused_or_harmless(original: Path, data: st.DataObject) -> None:
    damage_and_read(original, data)


@pytest.mark.soak
@given(st.data())
@settings(max_examples=50_000, deadline=None)
def test_no_damage_of_very_many_passes(original: Path, data: st.DataObject) -> None:
    """The same for some minutes."""
    damage_and_read(original, data)


def damage_and_read(original: Path, data: st.DataObject) -> None:
    """A flipped bit, a truncation or an appended byte, anywhere in any file."""
    files = sorted(path.relative_to(original).as_posix() for path in original.rglob("*") if path.is_file())
    file = data.draw(st.sampled_from(files))
    raw = (original / file).read_bytes()
    place = data.draw(st.integers(0, len(raw) - 1))
    match data.draw(st.sampled_from(["flip", "flip", "cut", "append", "zero"])):
        case "flip":
            bit = data.draw(st.integers(0, 7))
            damaged = raw[:place] + bytes([raw[place] ^ 1 << bit]) + raw[place + 1 :]
        case "cut":
            damaged = raw[:place]
        case "append":
            damaged = raw + b"\0"
        case _:
            damaged = raw[:place] + bytes(len(raw) - place)
    student = original.parent / "damaged"
    shutil.rmtree(student, ignore_errors=True)
    shutil.copytree(original, student)
    (student / file).write_bytes(damaged)
    refusal: PackedError | None = None
    try:
        read = content(student)
    except PackedError as error:
        refusal = error
    if refusal is None:
        assert read == content(original)
    else:
        assert str(student) in refusal.where


def test_every_byte_of_a_tensor_is_under_its_checksum(original: Path, tmp_path: Path) -> None:
    student = Path(shutil.copytree(original, tmp_path / "student"))
    raw = bytearray((original / TENSORS).read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    for place in range(start, len(raw)):
        raw[place] ^= 1 << place % 8
        (student / TENSORS).write_bytes(raw)
        raw[place] ^= 1 << place % 8
        with pytest.raises(PackedError, match="checksum"):
            PackedFolder.open(student).verify()


def test_trits_are_the_same_weights_in_a_smaller_file(original: Path, tmp_path: Path) -> None:
    planes, trits = PackedFolder.open(original), write(tmp_path / "trits", ternary=Layout.TRITS)
    assert (planes.manifest.format_version, trits.manifest.format_version) == (1, 2)
    for name, weight in packed_weights().items():
        for part in ("codes", "scales"):
            assert torch.equal(getattr(trits.weight(name), part), getattr(weight, part))
    assert trits.manifest.tensors["b.proj.trits"].shape == (4, 2)  # nine codes: five and four
    assert "a.proj.codes" in trits.manifest.tensors  # int3 has no trits
    assert trits.plain_names == planes.plain_names
    saved = planes.manifest.packed["b.proj"].bits_per_weight - trits.manifest.packed["b.proj"].bits_per_weight
    assert saved == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("edit", "what"),
    [
        (
            lambda own: own.update(format_version=FORMAT_VERSION + 1),
            f"format version {FORMAT_VERSION + 1}, and this bitdistill-ray reads up to {FORMAT_VERSION}",
        ),
        (lambda own: own.update(format_version="new"), "format version 'new'"),
        (lambda own: own["packed"]["a.proj"].update(shape=[3, 22]), "checksum"),
        (lambda own: own.pop("sha256"), "checksum"),
    ],
)
def test_a_changed_manifest_is_refused(original: Path, tmp_path: Path, edit: Callable[[Any], Any], what: str) -> None:
    student = Path(shutil.copytree(original, tmp_path / "student"))
    config = json.loads((student / CONFIG).read_text())
    edit(config[KEY])
    (student / CONFIG).write_text(json.dumps(config))
    with pytest.raises(PackedError, match=what):
        PackedFolder.open(student)


@pytest.mark.parametrize(
    ("edit", "what"),
    [
        (lambda t: t.pop("a.proj.zeros"), r"model\.safetensors:a\.proj\.zeros: is missing"),
        (lambda t: t.update(more=torch.ones(1)), r"model\.safetensors:more: is not in the manifest"),
        (lambda t: t.update({"embed.weight": torch.zeros(3, 4)}), r"embed\.weight: F32 \[3, 4\], not BF16 \[3, 4\]"),
        (lambda t: t.update({"b.proj.codes": torch.zeros(4, 4).byte()}), r"b\.proj\.codes: U8 \[4, 4\], not U8"),
        (lambda t: t["a.proj.codes"].zero_(), r"a\.proj\.codes: does not have the checksum"),
    ],
)  # fmt: skip
def test_other_tensors_are_refused_by_name(
    original: Path, tmp_path: Path, edit: Callable[[dict[str, torch.Tensor]], Any], what: str
) -> None:
    student = Path(shutil.copytree(original, tmp_path / "student"))
    tensors = load_file(student / TENSORS)
    edit(tensors)
    save_file(tensors, student / TENSORS)
    with pytest.raises(PackedError, match=what):
        PackedFolder.open(student).verify()


@pytest.mark.parametrize("file", [CONFIG, TENSORS, PROVENANCE, "tokenizer.json"])
def test_a_missing_file_is_named(original: Path, tmp_path: Path, file: str) -> None:
    student = Path(shutil.copytree(original, tmp_path / "student"))
    (student / file).unlink()
    with pytest.raises(PackedError, match=file.replace(".", r"\.")):
        PackedFolder.open(student)


def test_a_plain_checkpoint_is_no_packed_student(tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text('{"model_type": "llama"}')
    assert not PackedFolder.is_packed(tmp_path)
    with pytest.raises(PackedError, match="not a packed student"):
        PackedFolder.open(tmp_path)


def test_what_cannot_be_stored_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    weight = packed_weights()["a.proj"]
    bare: dict[str, Any] = {"config": {}, "packed": {}, "tensors": {}, "files": {}, "provenance": {}, "vocabulary": ""}
    for change, what in (
        ({"tensors": {"x": torch.zeros(2, dtype=torch.float64)}}, "float64"),
        ({"packed": {"p": weight}, "tensors": {"p.codes": torch.zeros(2)}}, "a packed and a plain tensor"),
        ({"files": {"../escape": b""}}, "names the file"),
        ({"subln": {"p": 1e-6}}, "SubLN"),
    ):
        with pytest.raises(PackedError, match=what):
            PackedFolder.write(tmp_path / "student", **{**bare, **change})
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_refuses_leaves_the_old_folder_as_it_was(tmp_path: Path) -> None:
    """A real refusal by the kernel: files of this process may grow to 300 bytes, then writing fails."""
    before = content(write(tmp_path / "student").path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))
    try:
        with pytest.raises(StorageError):
            write(tmp_path / "student")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert content(tmp_path / "student") == before
    assert os.listdir(tmp_path) == ["student"]


def test_rewriting_replaces_the_folder_whole(tmp_path: Path) -> None:
    path = write(tmp_path / "student").path
    (path / "left-over.bin").write_bytes(b"old")
    write(path)
    assert not (path / "left-over.bin").exists()
    assert os.listdir(tmp_path) == ["student"]
