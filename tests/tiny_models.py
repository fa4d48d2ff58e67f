"""Random models and a tokenizer, small enough for unit tests, in every supported family.

The cases cover what tends to break: tied and untied heads, grouped queries, biases, heads x head size != hidden size,
a sliding window shorter than a test sequence, a logit softcap.  Gains and biases are random too (transformers starts
them at 1 and 0), so that a test notices when one of them is lost.

    model = tiny_model("qwen3"); folder = save_tiny(tmp_path / "teacher", "qwen3")
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from bitdistill_ray.core import TokenBatch

VOCAB_SIZE = 320
EOS, PAD = "<|endoftext|>", "<|pad|>"

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "eos_token_id": 0,
    "pad_token_id": 1,
    "bos_token_id": None,
}

CASES: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {"tie_word_embeddings": True}),
    "llama-untied": (LlamaConfig, {"tie_word_embeddings": False, "mlp_bias": True}),
    "qwen2": (Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, {"tie_word_embeddings": True, "head_dim": 16}),
    "qwen3-untied": (Qwen3Config, {"tie_word_embeddings": False, "head_dim": 16}),
    "gemma3": (
        Gemma3TextConfig,
        {
            "tie_word_embeddings": True,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention"],
            "final_logit_softcapping": 3.0,
        },
    ),
}

EVERY_CASE = tuple(CASES)

SENTENCES = (
    "The quick brown fox jumps over the lazy dog.",
    "A teacher answers, a student listens; both read the same words.",
    "Numbers such as 1, 2, 3 and 4096 are words too.",
    "Le café est fermé, die Straße ist naß, 雨が降る。",
)

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_model(case: str = "llama", *, seed: int = 0, **config: Any) -> PreTrainedModel:
    """A random fp32 model in eval mode with sdpa attention; `config` overrides fields of its Hugging Face config."""
    config_class, fields = CASES[case]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            config_class(**{**SIZES, **fields, **config}), dtype=torch.float32, attn_implementation="sdpa"
        )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1:  # gains and biases
                    centre = 1.0 if "norm" in name and not case.startswith("gemma3") else 0.0
                    parameter.copy_(centre + 0.2 * torch.randn_like(parameter))
    return model.eval()


@cache
def _trained_bpe() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=[EOS, PAD, "<|im_start|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return str(tokenizer.to_str())


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of `VOCAB_SIZE` tokens with eos (id 0), pad (id 1) and a ChatML-like template."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained_bpe()),
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=CHAT_TEMPLATE,
    )


def save_tiny(folder: Path, case: str = "llama", *, seed: int = 0, **config: Any) -> Path:
    """Write `tiny_model(case)` and the tokenizer to `folder` as a Hugging Face checkpoint; returns the folder."""
    tiny_model(case, seed=seed, **config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def packed_batch(rows: list[list[int]], length: int, *, seed: int = 0) -> TokenBatch:
    """Random documents packed into rows: `rows` gives the lengths of each row's documents; the rest is padding."""
    generator = torch.Generator().manual_seed(seed)
    ids_BT = torch.full((len(rows), length), SIZES["pad_token_id"])
    segment_BT = torch.full((len(rows), length), -1, dtype=torch.int32)
    for row, lengths in enumerate(rows):
        start = 0
        for segment, tokens in enumerate(lengths):
            ids_BT[row, start : start + tokens] = torch.randint(4, VOCAB_SIZE, (tokens,), generator=generator)
            segment_BT[row, start : start + tokens] = segment
            start += tokens
    return TokenBatch(
        ids_BT=ids_BT,
        target_BT=segment_BT >= 0,
        segment_BT=segment_BT,
        sequence_ids=tuple(f"tiny#0#{row}" for row in range(len(rows))),
    )
