"""From a Hugging Face model to the native decoder's description of it, weight by weight where it lies.

Packed linears give their repacked weight, plain linears, embedding and head their own memory in 16 or 32 bits; gains
and biases are widened to fp32, with what the family adds to its gains.  The angles of RoPE are asked of the model's own
rotary embedding, so that every scaling that transformers computes from positions alone is right by construction.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bitdistill_kernels import Weight
from bitdistill_kernels.decoder import Activation, Layer, Linear, Model
from bitdistill_ray.core import Granularity
from bitdistill_ray.decode.cache import LayerKind, layer_kinds
from bitdistill_ray.errors import ModelError
from bitdistill_ray.model.families import Family, family_of, head_size
from bitdistill_ray.model.heads import LMHead
from bitdistill_ray.model.linear import QuantLinear
from bitdistill_ray.packed.embedding import PackedEmbedding
from bitdistill_ray.packed.linear import PackedLinear

ACTIVATIONS = {"silu": Activation.SILU, "gelu_pytorch_tanh": Activation.GELU_TANH}
STATIC_ROPE = ("default", "linear", "llama3", "yarn")  # angles that depend on the position alone


def native_model(model: Any, *, positions: int, activation_bits: int | None = None) -> Model:
    """The description of `model`, a causal LM of a supported family on the CPU, for up to `positions` positions.

    `activation_bits` is that of packed weights whose spec leaves activations alone: 8 gives each group of a token a
    scale where the weight has groups.
    Raises ModelError for what the native decoder does not support, naming what it does.
    """
    config, family = model.config, family_of(model.config)
    layers = list(model.get_submodule(family.layers).children())
    kinds = layer_kinds(config)
    tables = list(dict.fromkeys(kinds if _rope_by_kind(config) else kinds[:1]))
    head = LMHead(model)
    embedding = model.get_input_embeddings()
    reader = _Reader(family, activation_bits)
    return Model(
        layers=[
            reader.layer(
                layer,
                window=config.sliding_window if kind is LayerKind.SLIDING else None,
                rope=tables.index(kind) if kind in tables else 0,
            )
            for layer, kind in zip(layers, kinds, strict=True)
        ],
        embedding=_table(embedding, head.linear),
        head=reader.linear(head.linear),
        last_norm=reader.gain(model.base_model.norm),
        angles=[_angles(model, kind, positions) for kind in tables],
        heads=config.num_attention_heads,
        key_heads=config.num_key_value_heads,
        head_size=head_size(config),
        norm_eps=config.rms_norm_eps,
        attention_scale=float(layers[0].get_submodule(family.attention).scaling),
        embedding_scale=float(getattr(embedding, "scalar_embed_scale", 1.0)),
        soft_cap=head.softcap,
        activation=_activation(config),
    )


class _Reader:
    """Modules of one family, as the kernels' descriptions."""

    def __init__(self, family: Family, activation_bits: int | None) -> None:
        self.family, self.activation_bits = family, activation_bits

    def layer(self, layer: nn.Module, *, window: int | None, rope: int) -> Layer:
        parts = {name.rpartition(".")[2]: module for name, module in layer.named_modules()}
        query, key, value, output, gate, up, down = (self.linear(parts[name]) for name in self.family.linears)
        optional = (self.family.attention_out_norm, self.family.ffn_out_norm, "q_norm", "k_norm")
        after_attention, after_ffn, query_norm, key_norm = (
            self.gain(parts[name]) if name in parts else None for name in optional
        )
        return Layer(
            query=query,
            key=key,
            value=value,
            output=output,
            gate=gate,
            up=up,
            down=down,
            attention_norm=self.gain(parts[self.family.attention_norm]),
            ffn_norm=self.gain(parts[self.family.ffn_norm]),
            attention_out_norm=after_attention,
            ffn_out_norm=after_ffn,
            query_norm=query_norm,
            key_norm=key_norm,
            window=window,
            rope=rope,
        )

    def linear(self, module: Any) -> Linear:
        norm = getattr(module, "norm", None)
        spec = getattr(module, "spec", None)
        if isinstance(module, PackedLinear):
            weight: Any = module.repacked()
            own = module.packed.spec
            bits = own.activation_bits or self.activation_bits
            per_group = own.activation_bits is None and bits is not None and own.granularity is Granularity.GROUP
        elif isinstance(module, nn.Linear) and (spec is None or (module.baked and spec.activation_bits is None)):
            weight, bits, per_group = _on_cpu(module.weight), None, False
        else:
            kind = "latent quantised" if isinstance(module, QuantLinear) else type(module).__name__
            raise ModelError("native decoder", f"a {kind} linear", "It runs packed and plain linears: export it first")
        return Linear(
            weight,
            bias=None if module.bias is None else module.bias.detach().float(),
            norm=None if norm is None else norm.weight.detach().float(),
            norm_eps=0.0 if norm is None else norm.eps,
            activation_bits=bits,
            activation_per_group=per_group,
        )

    def gain(self, norm: Any) -> Tensor:
        gain: Tensor = norm.weight.detach().float() + self.family.gain_offset
        return gain


def _table(embedding: Any, head: Any) -> Weight | Tensor:
    """The embedding's table; one that is packed and tied is not repacked a second time."""
    if not isinstance(embedding, PackedEmbedding):
        return _on_cpu(embedding.weight)
    tied = isinstance(head, PackedLinear) and head.packed is embedding.packed
    return head.repacked() if tied else embedding.repacked()


def _activation(config: Any) -> Activation:
    name = getattr(config, "hidden_activation", None) or config.hidden_act
    if name not in ACTIVATIONS:
        raise ModelError("native decoder", f"the activation {name!r}", f"It runs {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _rope_by_kind(config: Any) -> bool:
    return any(kind.value in config.rope_parameters for kind in LayerKind)


@torch.no_grad()
def _angles(model: Any, kind: LayerKind, positions: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, C / 2] of the layers of one kind."""
    by_kind = _rope_by_kind(model.config)
    parameters = model.config.rope_parameters[kind.value] if by_kind else model.config.rope_parameters
    rope_type = parameters["rope_type"]
    if rope_type not in STATIC_ROPE:
        raise ModelError("native decoder", f"RoPE of type {rope_type!r}", f"It runs {', '.join(STATIC_ROPE)}")
    arguments = {"layer_type": kind.value} if by_kind else {}
    tables = model.base_model.rotary_emb(torch.empty(0), torch.arange(positions)[None], **arguments)
    width = head_size(model.config)
    if tables[0].shape[-1] != width:
        raise ModelError("native decoder", f"RoPE over {tables[0].shape[-1]} of {width} numbers", "It runs whole heads")
    cosines, sines = (table[0, :, : width // 2].contiguous() for table in tables)
    return cosines, sines


def _on_cpu(weight: Tensor) -> Tensor:
    if weight.device.type != "cpu":
        raise ModelError("native decoder", f"a weight on {weight.device}", "It runs on CPUs: load it with device=cpu")
    return weight.detach()
