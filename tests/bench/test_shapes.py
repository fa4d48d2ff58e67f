"""Models of known shapes: every part is packed as asked, once, and they run."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, Qwen3Config

from bitdistill_ray.bench.kernels import parse_format
from bitdistill_ray.bench.shapes import SHAPES, random_of_shape
from bitdistill_ray.errors import ConfigError
from bitdistill_ray.packed.embedding import PackedEmbedding
from bitdistill_ray.packed.linear import PackedLinear
from bitdistill_ray.packed.tables import HeadBits

SMALL = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}  # fmt: skip


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bits", list(HeadBits))
def test_linears_and_tables_are_packed_and_the_model_runs(
    bits: HeadBits, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Qwen3Config(**SMALL, tie_word_embeddings=True) if tied else LlamaConfig(**SMALL, tie_word_embeddings=False)
    monkeypatch.setitem(SHAPES, "small", config)
    model = random_of_shape("small", parse_format("ternary"), head_bits=bits)
    packed = [name for name, module in model.named_modules() if isinstance(module, PackedLinear)]
    assert len([name for name in packed if name != "lm_head"]) == 2 * 7
    assert ("lm_head" in packed) == (bits is not HeadBits.SIXTEEN)
    assert isinstance(model.get_input_embeddings(), PackedEmbedding) == (bits is not HeadBits.SIXTEEN)
    if tied and bits is not HeadBits.SIXTEEN:
        assert model.get_input_embeddings().packed is model.get_output_embeddings().packed
    logits = model.float()(torch.arange(12).view(2, 6)).logits
    assert logits.shape == (2, 6, 320)
    assert bool(logits.isfinite().all())


def test_a_shape_that_is_not_known_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"1\.1b-llama"):
        random_of_shape("unknown", None)
