"""The structs of include/bitdistill_decoder.h, field by field."""

from __future__ import annotations

import ctypes

from bitdistill_kernels.library import Pointer


class LinearStruct(ctypes.Structure):
    """`bdk_linear`."""

    _fields_ = (
        ("packed", Pointer),
        ("dense", Pointer),
        ("value_type", ctypes.c_int32),
        ("activation_bits", ctypes.c_int32),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("bias", Pointer),
        ("norm_gain", Pointer),
        ("norm_eps", ctypes.c_float),
        ("activation_per_group", ctypes.c_int32),
    )


class LayerStruct(ctypes.Structure):
    """`bdk_layer`."""

    _fields_ = (
        *((name, LinearStruct) for name in ("query", "key", "value", "output", "gate", "up", "down")),
        ("attention_norm", Pointer),
        ("ffn_norm", Pointer),
        ("attention_out_norm", Pointer),
        ("ffn_out_norm", Pointer),
        ("query_norm", Pointer),
        ("key_norm", Pointer),
        ("window", ctypes.c_int64),
        ("rope", ctypes.c_int64),
    )


class ModelStruct(ctypes.Structure):
    """`bdk_model`."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("hidden", "heads", "key_heads", "head_size", "ffn", "vocabulary")),
        ("layer_count", ctypes.c_int64),
        ("layers", ctypes.POINTER(LayerStruct)),
        ("embedding", LinearStruct),
        ("head", LinearStruct),
        ("last_norm", Pointer),
        ("cosines", Pointer),
        ("sines", Pointer),
        ("rope_count", ctypes.c_int64),
        ("positions", ctypes.c_int64),
        ("activation", ctypes.c_int32),
        ("norm_eps", ctypes.c_float),
        ("attention_scale", ctypes.c_float),
        ("embedding_scale", ctypes.c_float),
        ("soft_cap", ctypes.c_float),
        ("reserved", ctypes.c_int32),
    )
