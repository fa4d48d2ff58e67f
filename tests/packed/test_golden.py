"""Every later reader must read the golden folders, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bitdistill_ray.core import Format, Granularity
from bitdistill_ray.packed.folder import PackedFolder
from bitdistill_ray.packed.manifest import FORMAT_VERSION
from bitdistill_ray.packed.weight import pack, unpack
from bitdistill_ray.quant import dequantize
from tests.packed.golden.make import GOLDEN, expected_of, folder_of, layout_of, plain_tensors, specs

each = pytest.mark.parametrize("golden", GOLDEN)


@each
def test_codes_and_values_are_those_of_the_day_it_was_written(golden: str) -> None:
    folder, expected = PackedFolder.open(folder_of(golden)), load_file(expected_of(golden))
    assert set(folder.manifest.packed) == set(specs(GOLDEN[golden]))
    for name in folder.manifest.packed:
        quantized = unpack(folder.weight(name))
        assert torch.equal(quantized.codes_NK, expected[f"{name}.codes"]), name
        assert torch.equal(dequantize(quantized), expected[f"{name}.values"]), name
    for name, tensor in plain_tensors().items():
        assert folder.tensor(name).dtype is tensor.dtype
        assert torch.equal(folder.tensor(name), tensor)


def test_they_cover_every_format_and_granularity() -> None:
    packed = {(g, n): e for g in GOLDEN for n, e in PackedFolder.open(folder_of(g)).manifest.packed.items()}
    assert {entry.spec.format for entry in packed.values()} == {format.stored for format in Format}
    granularities = {entry.spec.granularity for entry in packed.values()}
    assert granularities == set(Granularity) - {Granularity.BLOCK}  # BLOCK is stored as GROUP
    assert any(entry.shape[1] % (entry.spec.group_size or 1) for entry in packed.values())


@each
def test_today_s_writer_gives_the_same_bytes(tmp_path: Path, golden: str) -> None:
    folder = PackedFolder.open(folder_of(golden))
    again = PackedFolder.write(
        tmp_path / "again",
        config=folder.config,
        packed={name: pack(unpack(folder.weight(name))) for name in folder.manifest.packed},
        tensors={name: folder.tensor(name) for name in folder.plain_names},
        files={"notes.txt": (folder.path / "notes.txt").read_bytes()},
        provenance=folder.provenance,
        vocabulary=folder.manifest.vocabulary,
        subln=folder.manifest.subln,
        ternary=layout_of(golden),
    )
    assert folder.manifest.format_version == int(golden.removeprefix("student-v")) <= FORMAT_VERSION
    for file in sorted(folder.path.iterdir()):
        assert (again.path / file.name).read_bytes() == file.read_bytes(), file.name
