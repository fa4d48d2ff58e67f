"""The native decoder: the forward pass of a llama-like model over packed or 16-bit weights, in C++.

A model is described once, in numpy arrays, torch CPU tensors and `Weight`s, whose memory is used where it lies:

    model = Model(layers=[Layer(query=Linear(weight), ...), ...], embedding=table_VD, head=Linear(table_VD), ...)
    decoder = NativeDecoder(model, slots=8, slot_tokens=2048)
    decoder.forward(slots=[0, 3], starts=[0, 17], counts=[5, 1], ids=[...six tokens...], wanted=[1, 1], out=logits)

    V vocabulary   D hidden size   N out features   K in features   C head size   F ffn size   T positions
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from bitdistill_kernels.buffers import Array, buffer
from bitdistill_kernels.decoder_structs import LayerStruct, LinearStruct, ModelStruct
from bitdistill_kernels.library import Pointer, check, library
from bitdistill_kernels.weight import Weight
from bitdistill_ray.errors import KernelError

_VALUE_TYPES = {"float32": 0, "float16": 1, "bfloat16": 2}  # enum bdk_value_type


class CacheType(IntEnum):
    """How keys and values are kept; the values are those of enum bdk_cache_type."""

    FP16 = 0
    INT8 = 1  # with a scale for each head and token


class Activation(IntEnum):
    """What opens the gate of an MLP; the values are those of enum bdk_activation."""

    SILU = 0
    GELU_TANH = 1


@dataclass(frozen=True, slots=True)
class Linear:
    """y = W norm(x) + bias."""

    weight: Weight | Array
    """Packed, or [N, K] in float32, float16 or bfloat16."""
    bias: Array | None = None
    """float32 [N]."""
    norm: Array | None = None
    """float32 [K], the gain of an RMSNorm in front (SubLN)."""
    norm_eps: float = 0.0
    activation_bits: int | None = None
    """Of a packed weight: 8, or None for fp32 activations."""
    activation_per_group: bool = False
    """int8 activations have a scale for each group of the weight, and not for each token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One layer; gains are float32 [D], those of queries and keys [C], with all that the family adds to them."""

    query: Linear
    key: Linear
    value: Linear
    output: Linear
    gate: Linear
    up: Linear
    down: Linear
    attention_norm: Array
    ffn_norm: Array
    attention_out_norm: Array | None = None
    ffn_out_norm: Array | None = None
    query_norm: Array | None = None
    key_norm: Array | None = None
    window: int | None = None
    """Positions that a query sees, itself included; None: all."""
    rope: int = 0
    """Which of the model's tables of angles."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model; `angles` are pairs of cosines and sines, float32 [T, C / 2] each."""

    layers: Sequence[Layer]
    embedding: Weight | Array
    head: Linear
    last_norm: Array
    angles: Sequence[tuple[Array, Array]]
    heads: int
    key_heads: int
    head_size: int
    norm_eps: float
    attention_scale: float
    embedding_scale: float = 1.0
    soft_cap: float | None = None
    activation: Activation = Activation.SILU


class NativeDecoder:
    """A model with a key-value cache of `slots` x `slot_tokens` tokens.  One thread at a time may drive it."""

    def __init__(self, model: Model, *, slots: int, slot_tokens: int, cache: CacheType = CacheType.FP16) -> None:
        """Raises KernelError where shapes do not fit each other, or memory is short."""
        self._description = _Description(model)
        handle = Pointer()
        status = library().bdk_decoder_create(
            ctypes.byref(self._description.struct), slots, slot_tokens, int(cache), ctypes.byref(handle)
        )
        check(status, "native decoder", f"{slots} slots of {slot_tokens} tokens",
              "Give matrices and gains that fit the model's sizes, or fewer slots")  # fmt: skip
        self._handle, self._forward = handle.value, library().bdk_decoder_forward
        self.vocabulary: int = self._description.struct.vocabulary
        weakref.finalize(self, library().bdk_decoder_free, handle.value)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the key-value cache (pages that no sequence has reached take no memory)."""
        return int(library().bdk_decoder_cache_bytes(self._handle))

    @property
    def scratch_bytes(self) -> int:
        """Bytes of the room for activations so far."""
        return int(library().bdk_decoder_scratch_bytes(self._handle))

    def forward(
        self,
        slots: Sequence[int],
        starts: Sequence[int],
        counts: Sequence[int],
        ids: Sequence[int],
        wanted: Sequence[int],
        out: Array,
    ) -> None:
        """Append counts[i] tokens to slots[i], which holds starts[i]; `ids` are those of all sequences in a row.

        `out`, float32 [sum of wanted, V], takes the logits after the last wanted[i] tokens of each sequence.
        Raises KernelError for a slot, position or id out of range, before anything is computed.
        """
        written = buffer(out, "out", ("float32",))
        if written.shape != (sum(wanted), self.vocabulary) or len(ids) != sum(counts):
            raise KernelError("out", f"of shape {list(written.shape)} for {sum(wanted)} of {len(ids)} tokens",
                              f"Give {[sum(wanted), self.vocabulary]}, and {sum(counts)} ids")  # fmt: skip
        columns = [(ctypes.c_int64 * len(column))(*column) for column in (slots, starts, counts, ids, wanted)]
        if status := self._forward(self._handle, len(slots), *columns, written.address):
            check(status, "native decoder", f"slots {list(slots)} from {list(starts)} on, {list(counts)} tokens",
                  "Give slots, positions and ids within the decoder's")  # fmt: skip

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Write the first `tokens` tokens of one slot's cache over those of another."""
        status = library().bdk_decoder_copy(self._handle, source, target, tokens)
        check(status, "native decoder", f"slots {source} and {target}", "Give slots of the decoder")


class _Description:
    """The structs of a model, and all that they point to."""

    def __init__(self, model: Model) -> None:
        self.kept: list[object] = []
        self.head_size = model.head_size
        vocabulary, hidden = _shape(model.embedding)
        self.layers = (LayerStruct * len(model.layers))(*(self._layer(layer) for layer in model.layers))
        tables = [np.stack([np.asarray(pair[which], np.float32) for pair in model.angles]) for which in (0, 1)]
        if tables[0].shape != tables[1].shape or tables[0].shape[2] != model.head_size // 2:
            raise KernelError("angles", f"of shape {list(tables[0].shape)}", f"Give [T, {model.head_size // 2}]")
        self.struct = ModelStruct(
            hidden=hidden,
            heads=model.heads,
            key_heads=model.key_heads,
            head_size=model.head_size,
            ffn=self.layers[0].gate.rows,
            vocabulary=vocabulary,
            layer_count=len(model.layers),
            layers=self.layers,
            embedding=self._linear(Linear(model.embedding)),
            head=self._linear(model.head),
            last_norm=self._vector(model.last_norm, hidden, "last_norm"),
            cosines=self._vector(tables[0].reshape(-1), tables[0].size, "cosines"),
            sines=self._vector(tables[1].reshape(-1), tables[1].size, "sines"),
            rope_count=tables[0].shape[0],
            positions=tables[0].shape[1],
            activation=int(model.activation),
            norm_eps=model.norm_eps,
            attention_scale=model.attention_scale,
            embedding_scale=model.embedding_scale,
            soft_cap=model.soft_cap or 0.0,
        )

    def _layer(self, layer: Layer) -> LayerStruct:
        hidden = _shape(layer.query.weight)[1]
        struct = LayerStruct(window=layer.window or 0, rope=layer.rope)
        for name in ("query", "key", "value", "output", "gate", "up", "down"):
            setattr(struct, name, self._linear(getattr(layer, name)))
        for name in ("attention_norm", "ffn_norm", "attention_out_norm", "ffn_out_norm"):
            setattr(struct, name, self._vector(getattr(layer, name), hidden, name))
        for name in ("query_norm", "key_norm"):
            setattr(struct, name, self._vector(getattr(layer, name), self.head_size, name))
        return struct

    def _linear(self, linear: Linear) -> LinearStruct:
        rows, columns = _shape(linear.weight)
        struct = LinearStruct(
            rows=rows,
            columns=columns,
            activation_bits=linear.activation_bits or 0,
            activation_per_group=linear.activation_per_group,
            bias=self._vector(linear.bias, rows, "bias"),
            norm_gain=self._vector(linear.norm, columns, "norm"),
            norm_eps=linear.norm_eps,
        )
        if isinstance(linear.weight, Weight):
            self.kept.append(linear.weight)
            struct.packed = linear.weight.handle
        else:
            memory = buffer(linear.weight, "weight", tuple(_VALUE_TYPES))
            self.kept.append(memory)
            struct.dense, struct.value_type = memory.address, _VALUE_TYPES[memory.dtype]
        return struct

    def _vector(self, vector: Array | None, size: int, what: str) -> int | None:
        if vector is None:
            return None
        memory = buffer(vector, what, ("float32",))
        if memory.shape != (size,):
            raise KernelError(what, f"of shape {list(memory.shape)}", f"Give [{size}]")
        self.kept.append(memory)
        return memory.address


def _shape(weight: Weight | Array) -> tuple[int, int]:
    rows, columns = weight.shape
    return int(rows), int(columns)
