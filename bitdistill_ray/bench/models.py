"""Random models to measure with when no model is named: the sizes matter, the weights do not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as token_models
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from bitdistill_ray.core import QuantSpec
from bitdistill_ray.model.surgery import quantize_linears
from bitdistill_ray.packed.model import export_packed

END = "<|end|>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A llama: hidden size, layers, vocabulary."""

    hidden: int = 512
    layers: int = 4
    vocabulary: int = 8192
    context: int = 1024
    heads: int | None = None
    """Query heads; None: one for each 64 of the hidden size."""
    head_size: int = 64
    key_heads: int | None = None
    """None: one for two query heads."""
    ffn: int | None = None
    """Its width; None: three times the hidden size."""

    def __str__(self) -> str:
        return f"random llama, {self.layers} layers of {self.hidden}"


def random_model(size: Size) -> Any:
    """A random fp32 causal LM, in eval mode."""
    heads = size.heads or max(2, size.hidden // size.head_size)
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.ffn or 3 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=heads,
        num_key_value_heads=size.key_heads or heads // 2,
        head_dim=size.head_size,
        max_position_embeddings=size.context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with a token for each byte and one that ends a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(token_models.BPE(vocab={token: i for i, token in enumerate([END, *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


def save_random(folder: Path, size: Size) -> str:
    """Write a random model as a Hugging Face checkpoint; returns the folder as a model source."""
    random_model(size).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def save_random_packed(folder: Path, size: Size, spec: QuantSpec) -> str:
    """Write a random model as a packed student; returns the folder as a model source."""
    model = random_model(size)
    quantize_linears(model, spec)
    export_packed(model, byte_tokenizer(), folder, provenance={"teacher": str(size)})
    return str(folder)
