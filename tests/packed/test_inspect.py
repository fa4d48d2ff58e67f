"""`bitdistill inspect`: figures that add up, and no figures for a folder that is damaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from bitdistill_ray.core import Format, QuantSpec
from bitdistill_ray.inspect import main
from bitdistill_ray.model.surgery import SubLN, insert_subln, quantize_linears
from bitdistill_ray.packed.folder import TENSORS, PackedFolder
from bitdistill_ray.packed.model import export_packed
from bitdistill_ray.packed.summary import summarise
from tests.tiny_models import tiny_model, tiny_tokenizer

SPEC = QuantSpec(format=Format.INT2, group_size=24, activation_bits=8)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_model("llama")
    insert_subln(model, SubLN.OUTPUTS)
    quantize_linears(model, SPEC)
    path = tmp_path_factory.mktemp("inspect") / "packed"
    return export_packed(model, tiny_tokenizer(), path, provenance={"teacher": "a teacher"}).path


def test_figures_are_those_of_the_files(student: Path) -> None:
    summary = summarise(PackedFolder.open(student))
    with safe_open(student / TENSORS, framework="pt") as file:
        sizes = {name: file.get_tensor(name).nbytes for name in file.keys()}  # noqa: SIM118  (no mapping)
    assert summary.bytes == sum(sizes.values())
    assert summary.bytes_without_embeddings == summary.bytes - sizes["model.embed_tokens.weight"]
    latent = tiny_model("llama")
    norms = 2 * (32 + 48)  # SubLN of o_proj and down_proj, in two layers
    assert summary.parameters == sum(p.numel() for p in latent.parameters()) + norms
    linears = [m for n, m in latent.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    assert summary.packed_weights == sum(m.weight.numel() for m in linears)
    bits = sum(SPEC.bits_per_weight(*m.weight.shape) * m.weight.numel() for m in linears)
    assert summary.bits_per_weight == pytest.approx(bits / summary.packed_weights)
    assert summary.specs == {"int2, group of 24, fp16 scales, int8 activations": 14}
    assert summary.subln == 4


def test_prints_for_people_and_for_programs(student: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(student), "--tensors"]) == 0
    text = capsys.readouterr().out
    assert "14 x int2, group of 24, fp16 scales, int8 activations" in text
    assert "model.layers.1.mlp.down_proj  [32, 48]" in text
    assert '"teacher": "a teacher"' in text
    assert main([str(student), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes"] == summarise(PackedFolder.open(student)).bytes


def test_a_damaged_student_is_refused(student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = Path(shutil.copytree(student, tmp_path / "damaged"))
    raw = bytearray((damaged / TENSORS).read_bytes())
    raw[-1] ^= 1
    (damaged / TENSORS).write_bytes(raw)
    assert main([str(damaged)]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert "checksum" in output.err
