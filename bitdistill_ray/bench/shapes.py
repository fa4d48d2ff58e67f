"""Models of known shapes with random weights, made in memory in seconds: the bytes matter, the numbers do not.

Codes are random bytes (what a ternary weight does not have is masked out), scales are such that activations keep their
size from layer to layer.  No checkpoint is written, and no quantiser runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3Config

from bitdistill_kernels import Weight
from bitdistill_ray.core import Format, PackedWeight, QuantSpec
from bitdistill_ray.errors import ConfigError
from bitdistill_ray.model.families import decoder_linears
from bitdistill_ray.model.taps import SDPA
from bitdistill_ray.packed.linear import PackedLinear
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
MIDDLE_ZEROS = 0x88  # two zero points of 4 bits
HEAD_GROUP = 128
HALF = torch.float16


def random_of_shape(name: str, spec: QuantSpec | None, *, seed: int = 0) -> Any:
    """A causal LM of a known shape, its linears packed as `spec` says, all else (without a spec: all) in fp16.

    Raises ConfigError for a name that is not known.
    """
    if name not in SHAPES:
        raise ConfigError("--shape", f"{name!r} is not known", f"Give one of {', '.join(SHAPES)}")
    generator = torch.Generator().manual_seed(seed)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(SHAPES[name], dtype=HALF, attn_implementation=SDPA)
    if spec is not None:
        for path, linear in list(decoder_linears(model)):
            parent, _, leaf = path.rpartition(".")
            packed = random_packed((linear.out_features, linear.in_features), spec, generator)
            setattr(model.get_submodule(parent), leaf, PackedLinear(packed))
    for module in model.modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                setattr(module, leaf, nn.Parameter(_random(parameter.shape, generator), requires_grad=False))
    if model.config.tie_word_embeddings:
        model.tie_weights()
    return model.eval()


def random_packed(shape: tuple[int, int], spec: QuantSpec, generator: torch.Generator) -> PackedWeight:
    """Random codes and zero points under scales of about the inverse root of K."""
    sizes = packed_shapes(spec, shape)
    codes = _bytes(sizes.codes, generator)
    if spec.format in (Format.TERNARY, Format.SEQ_TERNARY):
        codes &= ~((codes & MASKED_TERNARY) << 1)
    scales = torch.full(sizes.scales, shape[1] ** -0.5, dtype=SCALE_DTYPES[spec.scale_dtype])
    zeros = None if sizes.zeros is None else _bytes(sizes.zeros, generator)
    return PackedWeight(spec=spec, shape=shape, codes=codes, scales=scales, zeros=zeros)


@dataclass(frozen=True, slots=True)
class RandomHead:
    """A packed head, which is the embedding too where they are tied; `nbytes` are its canonical bytes."""

    weight: Weight
    nbytes: int

    @classmethod
    def of(cls, model: Any, bits: int, *, seed: int = 0) -> Self:
        """int4 or int8 codes in groups of `HEAD_GROUP`."""
        generator = torch.Generator().manual_seed(seed)
        N, K = model.config.vocab_size, model.config.hidden_size
        G = -(-K // HEAD_GROUP)
        codes = _bytes((N, -(-K * bits // 8)), generator)
        scales = torch.full((N, G), K**-0.5 / 2 ** (bits - 2), dtype=HALF)
        zeros = None
        if bits == 4:
            zeros = torch.full((N, -(-G // 2)), MIDDLE_ZEROS if G % 2 == 0 else MIDDLE_ZEROS & 15, dtype=torch.uint8)
        else:
            codes.clamp_(min=1)
        weight = Weight.create(codes, scales, zeros, format=f"int{bits}", shape=(N, K), group_size=HEAD_GROUP)
        return cls(weight, sum(part.nbytes for part in (codes, scales, zeros) if part is not None))


def _bytes(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(256, shape, dtype=torch.uint8, generator=generator)


def _random(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """A gain of ones, or a matrix that keeps the size of what it multiplies."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=HALF)
    return torch.empty(shape, dtype=HALF).normal_(std=shape[1] ** -0.5, generator=generator)
