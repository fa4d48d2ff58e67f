"""A model's shape, read from its header alone, is that of the model that loads."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
from torch import nn

from bitdistill_ray.errors import ModelError
from bitdistill_ray.shape import ModelShape, read_shape
from tests.model.tiny_gguf import write_gguf
from tests.tiny_models import EVERY_CASE, save_tiny, tiny_model, tiny_tokenizer

LLAMA2_7B = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}


def write_config(folder: Path, **fields: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**LLAMA2_7B, **fields}), encoding="utf-8")
    return folder


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """[N, K] of the linears of layer 0, by leaf name."""
    return {
        name.rsplit(".", 1)[-1]: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers.0." in name
    }


def agrees(shape: ModelShape, model: nn.Module) -> None:
    weights = {name: p for name, p in model.named_parameters() if p.ndim == 2}
    embeddings = {name: p for name, p in weights.items() if "embed_tokens" in name or "lm_head" in name}
    assert shape.linears == linear_shapes(model)
    assert shape.embedding_parameters == sum(p.numel() for p in embeddings.values())
    assert shape.linear_parameters == sum(p.numel() for n, p in weights.items() if n not in embeddings)
    assert shape.tied == (len(embeddings) == 1)


@pytest.mark.parametrize("case", EVERY_CASE)
def test_a_folder_has_the_shape_of_its_model(case: str, tmp_path: Path) -> None:
    agrees(read_shape(str(save_tiny(tmp_path / "model", case))), tiny_model(case))


def test_a_gguf_file_has_the_shape_of_its_model(tmp_path: Path) -> None:
    model = tiny_model("llama", intermediate_size=64)
    write_gguf(tmp_path / "tiny.gguf", model, tiny_tokenizer())
    shape = read_shape(str(tmp_path / "tiny.gguf"))
    agrees(shape, model)
    assert shape == read_shape(str(save_tiny(tmp_path / "folder", "llama", intermediate_size=64)))


def test_a_published_size(tmp_path: Path) -> None:
    """Llama-2-7B has 6,738,415,616 parameters, of which 266,240 are norms; its oldest config lacks several fields."""
    shape = read_shape(str(write_config(tmp_path)))
    assert shape.linear_parameters + shape.embedding_parameters + 266_240 == 6_738_415_616
    assert (shape.kv_heads, shape.head_size) == (32, 128)


def test_the_text_part_of_a_larger_model_counts(tmp_path: Path) -> None:
    inner = {**LLAMA2_7B, "num_hidden_layers": 3, "model_type": "gemma3_text"}
    shape = read_shape(str(write_config(tmp_path, text_config=inner)))
    assert (shape.family, shape.layers) == ("gemma3_text", 3)


def test_a_family_that_is_not_supported_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"is of family 'mamba'\. Supported: llama, qwen2, qwen3, gemma3_text"):
        read_shape(str(write_config(tmp_path, model_type="mamba")))


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json\. Give the folder"):
        read_shape(str(tmp_path))


def test_a_gguf_header_that_lacks_a_size_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "broken.gguf"), "llama")
    writer.add_embedding_length(32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"its header lacks llama\.attention\.head_count\. Use a complete GGUF"):
        read_shape(str(tmp_path / "broken.gguf"))
