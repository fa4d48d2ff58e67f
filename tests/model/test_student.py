"""A saved student comes back with the same codes and logits, whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from bitdistill_ray.core import Format, Granularity, QuantSpec
from bitdistill_ray.errors import ModelError
from bitdistill_ray.model.linear import QuantLinear
from bitdistill_ray.model.load import load_model
from bitdistill_ray.model.student import StudentSurgery, is_student, load_student, read_about, save_student
from bitdistill_ray.model.surgery import SubLN, calibrate_subln, insert_subln, quantize_linears
from bitdistill_ray.quant import quantize
from tests.tiny_models import EVERY_CASE, packed_batch, tiny_model, tiny_tokenizer

IDS = torch.arange(4, 24)[None]
INT2 = QuantSpec(format=Format.INT2, group_size=16)
TERNARY = QuantSpec(format=Format.TERNARY, granularity=Granularity.TENSOR, group_size=None, activation_bits=8)
LSQ3 = QuantSpec(format=Format.LSQ3, granularity=Granularity.ROW, group_size=None)


def make_student(case: str) -> torch.nn.Module:
    """A student with three formats at once, calibrated SubLNs, and gains and alphas that training has moved."""
    model = tiny_model(case)
    quantize_linears(model, lambda name, _: TERNARY if "mlp" in name else LSQ3 if "q_proj" in name else INT2)
    insert_subln(model, SubLN.OUTPUTS)
    calibrate_subln(model, [packed_batch([[16]], 16)])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".alpha", "proj.norm.weight")):
                parameter.mul_(1 + 0.1 * torch.rand_like(parameter))
    return model


@pytest.mark.parametrize("case", EVERY_CASE)
def test_codes_and_logits_survive(case: str, tmp_path: Path) -> None:
    student = make_student(case)
    save_student(tmp_path / "s", student, tiny_tokenizer(), provenance={"teacher": "tiny"})
    again, tokenizer = load_student(tmp_path / "s", dtype=torch.float32)
    assert StudentSurgery.of(again) == StudentSurgery.of(student)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, student(IDS).logits)
    for name, linear in student.named_modules():
        if isinstance(linear, QuantLinear):
            twin = again.get_submodule(name)
            codes = [quantize(x.weight, x.spec, alpha=x.alpha).codes_NK for x in (linear, twin)]
            assert torch.equal(*codes), name
    assert tokenizer.get_vocab() == tiny_tokenizer().get_vocab()
    assert read_about(tmp_path / "s")["provenance"] == {"teacher": "tiny"}


def test_fp32_masters_give_the_codes_of_the_bf16_working_copy(tmp_path: Path) -> None:
    """DeepSpeed trains on masters cast to bf16, so a student saved from masters must quantise that cast."""
    student = make_student("qwen3")
    masters = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    working = student
    for parameter in working.parameters():  # and not the buffers, whose fp32 RoPE frequencies DeepSpeed keeps
        parameter.data = parameter.data.bfloat16()
    save_student(tmp_path / "s", working, tiny_tokenizer(), tensors=masters)
    again, _ = load_student(tmp_path / "s", dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, working(IDS).logits)
    kept, _ = load_student(tmp_path / "s", dtype=torch.float32)
    assert torch.equal(kept.model.layers[0].mlp.up_proj.weight, masters["model.layers.0.mlp.up_proj.weight"])


def test_without_its_surgery_a_student_is_a_plain_checkpoint(tmp_path: Path) -> None:
    student = make_student("gemma3")
    save_student(tmp_path / "s", student, tiny_tokenizer())
    plain, _ = load_model(str(tmp_path / "s"), dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(plain(IDS).logits, tiny_model("gemma3")(IDS).logits)


def test_saving_again_replaces_the_folder_and_leaves_nothing_else(tmp_path: Path) -> None:
    student = make_student("llama")
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "stale").write_bytes(b"")
    save_student(tmp_path / "s", student, tiny_tokenizer())
    assert os.listdir(tmp_path) == ["s"]
    assert is_student(tmp_path / "s")
    assert not (tmp_path / "s" / "stale").exists()


def test_a_failed_save_leaves_the_old_student(tmp_path: Path) -> None:
    student = make_student("llama")
    save_student(tmp_path / "s", student, tiny_tokenizer(), provenance={"turn": 1})
    tensors = dict(student.named_parameters())
    del tensors["model.norm.weight"]
    with pytest.raises(ModelError, match=r"model\.norm\.weight: is missing"):
        save_student(tmp_path / "s", student, tiny_tokenizer(), tensors=tensors)
    with pytest.raises(TypeError, match="JSON"):
        save_student(tmp_path / "s", student, tiny_tokenizer(), provenance={"turn": object()})
    assert os.listdir(tmp_path) == ["s"]
    assert read_about(tmp_path / "s")["provenance"] == {"turn": 1}


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("no surgery", "has no bitdistill.json"),
        ("not JSON", "is not JSON"),
        ("newer", "is of version 99"),
        ("another linear", "the model has no such linear"),
        ("a lost gain", "is in one of"),
        ("no gains", "surgery.safetensors: cannot be read"),
    ],
)
def test_a_damaged_student_is_refused(damage: str, words: str, tmp_path: Path) -> None:
    folder = tmp_path / "s"
    save_student(folder, make_student("llama"), tiny_tokenizer())
    file = folder / "bitdistill.json"
    about = json.loads(file.read_text())
    match damage:
        case "no surgery":
            file.unlink()
        case "not JSON":
            file.write_text("{")
        case "newer":
            file.write_text(json.dumps({**about, "version": 99}))
        case "another linear":
            about["surgery"]["specs"]["model.layers.7.mlp.up_proj"] = INT2.to_dict()
            file.write_text(json.dumps(about))
        case "a lost gain":
            del about["surgery"]["subln_eps"]["model.layers.0.mlp.down_proj"]
            file.write_text(json.dumps(about))
        case "no gains":
            (folder / "surgery.safetensors").unlink()
    with pytest.raises(ModelError, match=words):
        load_student(folder, dtype=torch.float32)
