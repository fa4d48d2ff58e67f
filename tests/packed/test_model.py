"""Export and load: the packed student is the fake-quantised model, bit for bit in codes."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from bitdistill_ray.core import Format, Granularity, QuantSpec
from bitdistill_ray.errors import ModelError, PackedError
from bitdistill_ray.model.linear import QuantLinear
from bitdistill_ray.model.surgery import SubLN, insert_subln, quantize_linears
from bitdistill_ray.packed.embedding import PackedEmbedding
from bitdistill_ray.packed.folder import PackedFolder
from bitdistill_ray.packed.linear import PackedLinear
from bitdistill_ray.packed.model import export_packed, load_packed_model
from bitdistill_ray.packed.summary import is_table
from bitdistill_ray.packed.tables import HeadBits, packed_tables
from bitdistill_ray.packed.weight import unpack
from bitdistill_ray.quant import block_as_group, dequantize, quantize
from tests.tiny_models import CASES, VOCAB_SIZE, tiny_model, tiny_tokenizer

PER_TENSOR = {"granularity": Granularity.TENSOR, "group_size": None}
SPECS = {
    "ternary-a8": QuantSpec(format=Format.TERNARY, activation_bits=8, **PER_TENSOR),
    "ternary-block": QuantSpec(format=Format.TERNARY, granularity=Granularity.BLOCK, group_size=64, activation_bits=8),
    "int2": QuantSpec(format=Format.INT2, group_size=24),  # 32 and 48 inputs: a ragged last group
    "int3": QuantSpec(format=Format.INT3, granularity=Granularity.ROW, group_size=None),
    "nf3": QuantSpec(format=Format.NF3, group_size=20),
    "seq2": QuantSpec(format=Format.SEQ2, group_size=16),
}
IDS = torch.randint(3, VOCAB_SIZE, (2, 17), generator=torch.Generator().manual_seed(0))


def student(case: str, spec: QuantSpec, *, subln: SubLN = SubLN.NONE, dtype: torch.dtype = torch.float32) -> Any:
    model = tiny_model(case)
    insert_subln(model, subln)
    quantize_linears(model, spec)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".norm.weight"):
                parameter.copy_(1 + 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    return in_dtype(model, dtype)


def in_dtype(model: Any, dtype: torch.dtype) -> Any:
    """The model with its parameters in `dtype`, but fp32 values in fp16, which is how they are stored.

    (Not `model.to(dtype)`, which would round the frequencies of RoPE too; loading a checkpoint does not.)
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float() if dtype is torch.float32 else parameter.data.to(dtype)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits.float()


@pytest.mark.parametrize("spec", SPECS)
def test_codes_are_those_of_the_fake_quantised_model(spec: str, tmp_path: Path) -> None:
    """In bf16, as a student is trained: the working copy decides, not a master in fp32."""
    model = student("qwen3", SPECS[spec], dtype=torch.bfloat16)
    export_packed(model, tiny_tokenizer(), tmp_path / "packed", provenance={})
    loaded, _ = load_packed_model(tmp_path / "packed", dtype=torch.bfloat16, kernels=False)
    for name, linear in model.named_modules():
        if isinstance(linear, QuantLinear):
            assert linear.spec is not None
            packed = loaded.get_submodule(name)
            expected = block_as_group(quantize(linear.weight, linear.spec, alpha=linear.alpha))
            assert isinstance(packed, PackedLinear)
            assert torch.equal(unpack(packed.packed).codes_NK, expected.codes_NK)
            assert torch.equal(dequantize(unpack(packed.packed)).bfloat16(), linear.quantized_weight())
    assert torch.equal(logits(loaded), logits(model))  # the reference path: not one bit differs


@pytest.mark.parametrize("spec", SPECS)
def test_kernels_give_the_logits_and_the_greedy_text_of_the_fake_quantised_model(spec: str, tmp_path: Path) -> None:
    model = student("llama", SPECS[spec], subln=SubLN.OUTPUTS)
    export_packed(model, tiny_tokenizer(), tmp_path / "packed", provenance={})
    loaded, _ = load_packed_model(tmp_path / "packed")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-3, atol=1e-3)
    options = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": -1}
    assert torch.equal(loaded.generate(IDS[:1], **options), model.generate(IDS[:1], **options))


@pytest.mark.parametrize("case", CASES)
def test_every_family_comes_back_whole(case: str, tmp_path: Path) -> None:
    """Biases, q/k norms, softcaps, tied and untied heads, SubLN in front of every linear."""
    model = student(case, SPECS["int2"], subln=SubLN.ALL)
    folder = export_packed(model, tiny_tokenizer(), tmp_path / "packed", provenance={"teacher": case})
    loaded, tokenizer = load_packed_model(tmp_path / "packed")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-3, atol=1e-3)
    assert tokenizer("a fox")["input_ids"] == tiny_tokenizer()("a fox")["input_ids"]
    assert ("lm_head.weight" in folder.plain_names) is not model.config.tie_word_embeddings
    assert not any(parameter.is_meta or parameter.requires_grad for parameter in loaded.parameters())
    assert loaded.generation_config.eos_token_id == 0


def test_a_subln_in_front_of_an_unquantised_linear_comes_back(tmp_path: Path) -> None:
    model = tiny_model("llama")
    insert_subln(model, SubLN.OUTPUTS, gain=0.7)
    quantize_linears(model, SPECS["int2"], include=["up_proj"])
    in_dtype(model, torch.float32)
    export_packed(model, tiny_tokenizer(), tmp_path / "packed", provenance={})
    torch.testing.assert_close(logits(load_packed_model(tmp_path / "packed")[0]), logits(model), rtol=1e-3, atol=1e-3)


def test_a_packed_head_comes_back(tmp_path: Path) -> None:
    model = tiny_model("llama-untied")
    quantize_linears(model, SPECS["int2"], include=["lm_head", "gate_proj"], exclude=())
    in_dtype(model, torch.float32)
    folder = export_packed(model, tiny_tokenizer(), tmp_path / "packed", provenance={})
    assert "lm_head" in folder.manifest.packed
    torch.testing.assert_close(logits(load_packed_model(tmp_path / "packed")[0]), logits(model), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("bits", [HeadBits.EIGHT, HeadBits.FOUR])
@pytest.mark.parametrize("case", CASES)
def test_packed_tables_are_the_tables_that_their_codes_stand_for(case: str, bits: HeadBits, tmp_path: Path) -> None:
    """Tied and untied, with Gemma's scale; the whole model is the one whose tables have been exchanged by hand."""
    model = student(case, SPECS["int2"])
    folder = export_packed(model, tiny_tokenizer(), tmp_path / "packed", provenance={}, head_bits=bits)
    tables = {"model.embed_tokens"} | (set() if model.config.tie_word_embeddings else {"lm_head"})
    assert {name for name in folder.manifest.packed if is_table(name)} == tables
    assert not any(is_table(name) for name in folder.plain_names)
    loaded, _ = load_packed_model(tmp_path / "packed", kernels=False)
    for name in tables:
        weight = model.get_submodule(name).weight
        exchanged = dequantize(unpack(folder.weight(name)))
        error = float((exchanged - weight.detach()).norm() / weight.detach().norm())
        assert 0 < error < (0.01 if bits is HeadBits.EIGHT else 0.12)
        weight.data.copy_(exchanged)
    assert torch.equal(logits(loaded), logits(model))
    assert isinstance(loaded.get_input_embeddings(), PackedEmbedding)
    assert isinstance(loaded.get_output_embeddings(), PackedLinear)


def test_a_range_is_clipped_where_that_makes_the_error_of_a_4_bit_table_smaller() -> None:
    torch.manual_seed(0)
    model = tiny_model("llama")
    weight = model.get_input_embeddings().weight
    weight.data[:, ::7] *= 2  # outliers
    spec = QuantSpec(format=Format.INT4, group_size=32)
    (packed,) = packed_tables(model, HeadBits.FOUR).values()
    error = (dequantize(unpack(packed)) - weight.detach()).square().sum()
    assert packed.spec == spec
    assert float(error) < 0.97 * float((dequantize(quantize(weight, spec)) - weight.detach()).square().sum())


def test_a_head_that_the_recipe_quantised_stays_as_it_was_trained(tmp_path: Path) -> None:
    model = tiny_model("llama-untied")
    quantize_linears(model, SPECS["int2"], include=["lm_head", "gate_proj"], exclude=())
    folder = export_packed(model, tiny_tokenizer(), tmp_path / "packed", provenance={}, head_bits=HeadBits.EIGHT)
    specs = {name: entry.spec.format for name, entry in folder.manifest.packed.items() if is_table(name)}
    assert specs == {"lm_head": Format.INT2, "model.embed_tokens": Format.INT8}


def test_the_same_student_gives_the_same_bytes_and_no_path_of_this_machine(tmp_path: Path) -> None:
    digests = []
    for name in ("one", "two"):
        export_packed(student("gemma3", SPECS["nf3"]), tiny_tokenizer(), tmp_path / name, provenance={"recipe": "r"})
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        digests.append({path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files})
        assert not any(str(tmp_path).encode() in path.read_bytes() for path in files)
    assert digests[0] == digests[1]


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    export_packed(student("llama", SPECS["int2"]), tiny_tokenizer(), tmp_path / "packed", provenance={})
    other = tiny_tokenizer()
    other.add_tokens(["<new>"])
    other.save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "tokenizer.json", tmp_path / "packed" / "tokenizer.json")
    with pytest.raises(PackedError, match=r"tokenizer\.json"):
        load_packed_model(tmp_path / "packed")


def test_a_tokenizer_whose_files_match_but_whose_vocabulary_does_not_is_refused(tmp_path: Path) -> None:
    export_packed(student("llama", SPECS["int2"]), tiny_tokenizer(), tmp_path / "packed", provenance={})
    folder = PackedFolder.open(tmp_path / "packed")
    rewrite(folder, vocabulary="0" * 64)
    with pytest.raises(PackedError, match="does not have the vocabulary"):
        load_packed_model(folder.path)


def rewrite(folder: PackedFolder, **changes: Any) -> None:
    """Write a folder again, consistent in itself, with some of its parts exchanged."""
    files = {name: (folder.path / name).read_bytes() for name in folder.manifest.files if name != "provenance.json"}
    parts: dict[str, Any] = {
        "config": folder.config,
        "packed": {name: folder.weight(name) for name in folder.manifest.packed},
        "tensors": {name: folder.tensor(name) for name in folder.plain_names},
        "files": files,
        "provenance": folder.provenance,
        "vocabulary": folder.manifest.vocabulary,
        "subln": folder.manifest.subln,
    }
    PackedFolder.write(folder.path, **{**parts, **changes})


def test_a_folder_that_does_not_fit_its_own_config_is_refused_by_tensor(tmp_path: Path) -> None:
    export_packed(student("llama", SPECS["int2"]), tiny_tokenizer(), tmp_path / "packed", provenance={})
    folder = PackedFolder.open(tmp_path / "packed")
    config, plain = folder.config, {name: folder.tensor(name) for name in folder.plain_names}
    packed = {name: folder.weight(name) for name in folder.manifest.packed}
    fewer = {name: tensor for name, tensor in plain.items() if name != "model.norm.weight"}
    for changes, what in (
        ({"tensors": fewer}, r"model\.norm\.weight: is missing"),
        ({"tensors": {**plain, "model.more": torch.ones(2)}}, r"model\.more: \[2\], but the model has no such tensor"),
        ({"config": {**config, "vocab_size": 64}}, r"embed_tokens\.weight: \[320, 32\], but the model has \[64, 32\]"),
        ({"config": {**config, "intermediate_size": 40}}, r"a packed \[32, 48\] matrix, but the model has"),
        ({"config": {**config, "model_type": "nothing"}}, "gives no model with this transformers"),
        ({"packed": {**packed, "model.other": next(iter(packed.values()))}}, r"model\.other"),
    ):
        rewrite(folder, **{"config": config, "packed": packed, "tensors": plain, **changes})
        with pytest.raises(PackedError, match=what):
            load_packed_model(folder.path)


def test_a_family_that_is_not_supported_is_refused(tmp_path: Path) -> None:
    export_packed(student("llama", SPECS["int2"]), tiny_tokenizer(), tmp_path / "packed", provenance={})
    rewrite(PackedFolder.open(tmp_path / "packed"), config={"model_type": "gpt2"})
    with pytest.raises(ModelError, match="gpt2"):
        load_packed_model(tmp_path / "packed")


def test_exports_that_would_lose_something_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PackedError, match="no quantised linear"):
        export_packed(tiny_model("llama"), tiny_tokenizer(), tmp_path / "packed", provenance={})
    model = student("llama", SPECS["int2"])
    with torch.no_grad():
        model.get_input_embeddings().weight[5, 5] = 1e5  # beyond fp16
    with pytest.raises(PackedError, match=r"embed_tokens\.weight: has values that are not finite in torch\.float16"):
        export_packed(model, tiny_tokenizer(), tmp_path / "packed", provenance={})
    export_packed(model, tiny_tokenizer(), tmp_path / "packed", provenance={}, store_dtype=torch.bfloat16)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.up_proj"):
        export_packed(model, tiny_tokenizer(), tmp_path / "again", provenance={})
    assert not (tmp_path / "again").exists()
