"""Every later reader must read the golden folder, bit for bit."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from bitdistill_ray.core import Format, Granularity
from bitdistill_ray.packed.folder import PackedFolder
from bitdistill_ray.packed.manifest import FORMAT_VERSION
from bitdistill_ray.packed.weight import pack, unpack
from bitdistill_ray.quant import dequantize
from tests.packed.golden.make import EXPECTED, FOLDER, plain_tensors, specs


def test_codes_and_values_are_those_of_the_day_it_was_written() -> None:
    folder, expected = PackedFolder.open(FOLDER), load_file(EXPECTED)
    assert set(folder.manifest.packed) == set(specs())
    for name in folder.manifest.packed:
        quantized = unpack(folder.weight(name))
        assert torch.equal(quantized.codes_NK, expected[f"{name}.codes"]), name
        assert torch.equal(dequantize(quantized), expected[f"{name}.values"]), name
    for name, tensor in plain_tensors().items():
        assert folder.tensor(name).dtype is tensor.dtype
        assert torch.equal(folder.tensor(name), tensor)


def test_it_covers_every_format_and_granularity() -> None:
    packed = PackedFolder.open(FOLDER).manifest.packed
    assert {entry.spec.format for entry in packed.values()} == {format.stored for format in Format}
    granularities = {entry.spec.granularity for entry in packed.values()}
    assert granularities == set(Granularity) - {Granularity.BLOCK}  # BLOCK is stored as GROUP
    assert any(entry.shape[1] % (entry.spec.group_size or 1) for entry in packed.values())


def test_today_s_writer_gives_the_same_bytes(tmp_path: Path) -> None:
    golden = PackedFolder.open(FOLDER)
    again = PackedFolder.write(
        tmp_path / "again",
        config=golden.config,
        packed={name: pack(unpack(golden.weight(name))) for name in golden.manifest.packed},
        tensors={name: golden.tensor(name) for name in golden.plain_names},
        files={"notes.txt": (FOLDER / "notes.txt").read_bytes()},
        provenance=golden.provenance,
        vocabulary=golden.manifest.vocabulary,
        subln=golden.manifest.subln,
    )
    assert FORMAT_VERSION == 1  # with a new version, this test goes on to the new golden folder; the others stay
    for file in sorted(FOLDER.iterdir()):
        assert (again.path / file.name).read_bytes() == file.read_bytes(), file.name
