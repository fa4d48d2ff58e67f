"""Models of known shapes with random weights, made in memory in seconds: the bytes matter, the numbers do not.

Codes are random bytes (what a ternary weight does not have is masked out), scales are such that activations keep their
size from layer to layer.  No checkpoint is written, and no quantiser runs.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3Config

from bitdistill_ray.core import Format, PackedWeight, QuantSpec
from bitdistill_ray.errors import ConfigError
from bitdistill_ray.model.families import decoder_linears
from bitdistill_ray.model.taps import SDPA
from bitdistill_ray.packed.model import place_packed
from bitdistill_ray.packed.tables import HeadBits, table_spec, tables
from bitdistill_ray.packed.weight import SCALE_DTYPES, packed_shapes

SHAPES: dict[str, PretrainedConfig] = {
    "1.1b-llama": LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    ),
    "qwen3-0.6b": Qwen3Config(
        vocab_size=151936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        tie_word_embeddings=True,
    ),
}
MASKED_TERNARY = 0b01010101  # the low bits of four codes
LOW_BITS = 2
HALF = torch.float16


def random_of_shape(name: str, spec: QuantSpec | None, *, head_bits: HeadBits = HeadBits.SIXTEEN, seed: int = 0) -> Any:
    """A causal LM of a known shape, its linears packed as `spec` says, its tables in `head_bits`, all else in fp16.

    Raises ConfigError for a name that is not known.
    """
    if name not in SHAPES:
        raise ConfigError("--shape", f"{name!r} is not known", f"Give one of {', '.join(SHAPES)}")
    generator = torch.Generator().manual_seed(seed)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(SHAPES[name], dtype=HALF, attn_implementation=SDPA)
    model.tie_weights()  # where they are: one table then, which is packed once
    specs = {} if spec is None else {path: spec for path, _ in decoder_linears(model)}
    if table := table_spec(head_bits, spec.activation_bits if spec else None):
        specs |= dict.fromkeys(tables(model), table)
    for path, of in specs.items():
        N, K = model.get_submodule(path).weight.shape
        place_packed(model, path, random_packed((N, K), of, generator))
    for module in model.modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                setattr(module, leaf, nn.Parameter(_random(parameter.shape, generator), requires_grad=False))
    if model.config.tie_word_embeddings and head_bits is HeadBits.SIXTEEN:
        model.tie_weights()
    return model.eval()


def random_packed(shape: tuple[int, int], spec: QuantSpec, generator: torch.Generator) -> PackedWeight:
    """Random codes and zero points under scales that make values of about the inverse root of K."""
    sizes = packed_shapes(spec, shape)
    codes = _bytes(sizes.codes, generator)
    if spec.format in (Format.TERNARY, Format.SEQ_TERNARY):
        codes &= ~((codes & MASKED_TERNARY) << 1)
    if spec.format is Format.INT8:
        codes.clamp_(min=1)
    step = 2.0 ** (spec.format.code_bits - LOW_BITS)  # of codes: a scale is about so much smaller
    scales = torch.full(sizes.scales, shape[1] ** -0.5 / step, dtype=SCALE_DTYPES[spec.scale_dtype])
    zeros = None if sizes.zeros is None else _bytes(sizes.zeros, generator)
    return PackedWeight(spec=spec, shape=shape, codes=codes, scales=scales, zeros=zeros)


def _bytes(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(256, shape, dtype=torch.uint8, generator=generator)


def _random(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """A gain of ones, or a matrix that keeps the size of what it multiplies."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=HALF)
    return torch.empty(shape, dtype=HALF).normal_(std=shape[1] ** -0.5, generator=generator)
