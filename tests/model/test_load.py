"""Loading gives the saved function in the asked dtype, and what cannot be used is refused by name."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from bitdistill_ray.data.encoder import load_encoder
from bitdistill_ray.errors import ModelError, TeacherError
from bitdistill_ray.model import gguf_file
from bitdistill_ray.model.identity import identity, refuse_change, refuse_mismatch
from bitdistill_ray.model.load import load_model, readable
from tests.model.tiny_gguf import write_gguf
from tests.tiny_models import CASES, EVERY_CASE, save_tiny, tiny_model, tiny_tokenizer

IDS = torch.arange(4, 20)[None]


@pytest.mark.parametrize("case", EVERY_CASE)
def test_a_saved_model_comes_back(case: str, tmp_path: Path) -> None:
    model, tokenizer = load_model(str(save_tiny(tmp_path / "m", case)), dtype=torch.float32)
    assert not model.training
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, tiny_model(case)(IDS).logits, rtol=0, atol=0)
    assert tokenizer("The dog").input_ids == tiny_tokenizer()("The dog").input_ids


def test_the_dtype_is_the_one_asked_for(tmp_path: Path) -> None:
    model, _ = load_model(str(save_tiny(tmp_path / "m")), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_gguf_file_is_dequantised_and_no_longer_quantised(tmp_path: Path) -> None:
    original = tiny_model("llama", hidden_size=64, intermediate_size=96)
    write_gguf(tmp_path / "tiny.gguf", original, tiny_tokenizer())
    model, tokenizer = load_model(str(tmp_path / "tiny.gguf"), dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, original(IDS).logits, rtol=1e-4, atol=1e-4)
    assert tokenizer("The lazy dog").input_ids == tiny_tokenizer()("The lazy dog").input_ids
    assert all(type(m) is torch.nn.Linear for n, m in model.named_modules() if n.endswith("_proj"))
    model.save_pretrained(tmp_path / "again")
    tokenizer.save_pretrained(tmp_path / "again")
    assert "quantization_config" not in (tmp_path / "again" / "config.json").read_text()
    again, _ = load_model(str(tmp_path / "again"), dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_a_gguf_file_is_dequantised_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads, read = [], gguf_file._read
    monkeypatch.setenv("BITDISTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gguf_file, "_read", lambda *how: reads.append(how) or read(*how))
    file = tmp_path / "tiny.gguf"
    for seed, dtype, times in ((0, torch.float32, 1), (0, torch.float32, 1), (0, torch.bfloat16, 2), (1, None, 3)):
        original = tiny_model("llama", seed=seed, hidden_size=64, intermediate_size=96)
        if times in (1, 3) and not (times == 1 and reads):
            write_gguf(file, original, tiny_tokenizer())
        model, _ = load_model(str(file), dtype=dtype or torch.float32)
        assert len(reads) == times
        assert next(model.parameters()).dtype is (dtype or torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, original(IDS).logits, rtol=1e-4, atol=1e-4)


def test_another_family_is_refused_with_the_supported_ones(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=320)).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"gpt2.*llama, qwen2, qwen3, gemma3_text"):
        load_model(str(tmp_path), dtype=torch.float32)


def test_a_tokenizer_that_is_too_large_is_refused(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "m", vocab_size=300)
    with pytest.raises(ModelError, match=r"tokenizer .* makes ids up to 319, but its model has 300 embeddings"):
        load_model(str(folder), dtype=torch.float32)


@pytest.mark.parametrize("damage", ["no config", "no weights", "cut short", "a tensor missing", "no tokenizer"])
def test_a_damaged_folder_is_refused(damage: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "m", "llama-untied")
    weights = folder / "model.safetensors"
    match damage:
        case "no config":
            (folder / "config.json").unlink()
        case "no weights":
            weights.unlink()
        case "cut short":
            weights.write_bytes(weights.read_bytes()[:-1000])
        case "a tensor missing":
            from safetensors.torch import load_file, save_file

            tensors = load_file(weights)
            del tensors["model.layers.1.mlp.up_proj.weight"]
            save_file(tensors, weights, metadata={"format": "pt"})
        case "no tokenizer":
            for file in folder.glob("tokenizer*"):
                file.unlink()
    with pytest.raises(ModelError) as caught:
        load_model(str(folder), dtype=torch.float32)
    assert caught.value.where == str(folder)


def test_an_empty_folder_and_a_fake_gguf_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"not a GGUF file at all")
    (tmp_path / "empty").mkdir()
    for source in ("bad.gguf", "empty"):
        with pytest.raises(ModelError, match="cannot be loaded"):
            load_model(str(tmp_path / source), dtype=torch.float32)


def test_the_same_model_is_the_same_wherever_it_lies(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "a", "qwen3")
    shutil.copytree(folder, tmp_path / "b")
    a, b = (identity(*load_model(str(tmp_path / name), dtype=torch.float32)) for name in "ab")
    refuse_change(a, b)
    refuse_mismatch(a, b)
    assert a.name != b.name


@pytest.mark.parametrize("change", ["one weight", "two rows exchanged", "the dtype", "the config"])
def test_a_changed_teacher_is_refused_by_what_changed(change: str) -> None:
    tokenizer, before = tiny_tokenizer(), identity(tiny_model("llama"), tiny_tokenizer())
    model = tiny_model("llama", rope_theta=5.0) if change == "the config" else tiny_model("llama")
    weight_NK = model.model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        if change == "one weight":
            weight_NK[3, 7] = torch.nextafter(weight_NK[3, 7], torch.tensor(1.0))
        elif change == "two rows exchanged":
            weight_NK[[0, 30]] = weight_NK[[30, 0]]
        elif change == "the dtype":
            model = model.bfloat16()
    with pytest.raises(TeacherError, match="config hash" if change == "the config" else "weights hash"):
        refuse_change(before, identity(model, tokenizer))


def test_a_teacher_with_other_tokens_is_refused() -> None:
    student = identity(tiny_model("llama"), tiny_tokenizer())
    larger = identity(tiny_model("qwen3", vocab_size=384), tiny_tokenizer())
    with pytest.raises(TeacherError, match=r"vocab_size size differs.*320.*384"):
        refuse_mismatch(student, larger)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    with pytest.raises(TeacherError, match="tokenizer hash differs"):
        refuse_mismatch(student, identity(tiny_model("qwen3"), tokenizer))
    refuse_mismatch(student, identity(tiny_model("qwen3", num_hidden_layers=1), tiny_tokenizer()))


def test_every_tiny_case_is_of_a_supported_family() -> None:
    from bitdistill_ray.model.families import FAMILIES

    assert {config.model_type for config, _ in CASES.values()} == set(FAMILIES)


def test_a_gguf_files_folder_has_its_tokenizer(tmp_path: Path) -> None:
    """`finetune` reads its corpus with it before there is a student."""
    write_gguf(tmp_path / "tiny.gguf", tiny_model("llama", intermediate_size=64), tiny_tokenizer())
    encoder = load_encoder(readable(str(tmp_path / "tiny.gguf"), dtype=torch.float32))
    text = "the cat sat on the mat"
    assert encoder.encode([text])[0].tolist() == tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]
