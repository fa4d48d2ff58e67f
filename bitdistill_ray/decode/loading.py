"""From a path to a model that decodes: a packed student with its kernels, a latent student, or any model source.

A packed student on a CPU is run by the native decoder wherever that supports it, and keeps its 16-bit tensors as they
are stored; a line on stderr says why where it does not.  All else is run by torch.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from bitdistill_ray.decode.base import Decoder
from bitdistill_ray.decode.native_decoder import NativeDecoder
from bitdistill_ray.decode.native_model import native_model
from bitdistill_ray.decode.torch_decoder import TorchDecoder
from bitdistill_ray.errors import ModelError
from bitdistill_ray.model.linear import bake
from bitdistill_ray.model.load import load_model
from bitdistill_ray.model.sources import resolve
from bitdistill_ray.model.student import is_student, load_student, saved_dtype
from bitdistill_ray.packed.folder import PackedFolder
from bitdistill_ray.packed.linear import PackedLinear
from bitdistill_ray.packed.model import load_packed_model


def load_decoder(path: str, *, device: torch.device | str = "cpu") -> tuple[Any, Any]:
    """(model, tokenizer) of `path`, the model as `decoder_over` is best given it.

    Raises ModelError, PackedError, StorageError or KernelError.
    """
    place = resolve(path)
    if torch.device(device).type != "cpu" or not PackedFolder.is_packed(place):
        return load_for_decoding(path, device=device)
    stored = getattr(torch, PackedFolder.open(place).config["dtype"])
    model, tokenizer = load_packed_model(place, dtype=stored)
    if reason := why_not_native(model):
        print(f"decoding with torch, for {reason}", file=sys.stderr)
        model.float()
    return model, tokenizer


def decoder_over(model: Any, *, slots: int, slot_tokens: int, activation_bits: int | None = None) -> Decoder:
    """The native decoder for a packed student that it supports, else torch's.

    `activation_bits` 8 rounds the activations in front of weight-only linears, group by group: 2.4 times the
    tokens/s of a 2-bit SmolLM2, 1.3 of a 4-bit one (docs/LOG.md); torch's decoder has no use for it, and says so.
    """
    native = why_not_native(model) is None
    if activation_bits is not None and not (native and _leaves_activations_open(model)):
        why = "every linear has its own" if native else "torch decodes"
        print(f"activation_bits={activation_bits} has no effect: {why}", file=sys.stderr)
    if native:
        return NativeDecoder(model, slots=slots, slot_tokens=slot_tokens, activation_bits=activation_bits)
    return TorchDecoder(model, slots=slots, slot_tokens=slot_tokens)


def _leaves_activations_open(model: Any) -> bool:
    packed = [module.packed.spec for module in model.modules() if isinstance(module, PackedLinear)]
    return any(spec.activation_bits is None for spec in packed)


def why_not_native(model: Any) -> str | None:
    """What keeps a model from the native decoder, or None.  Raises KernelError where its kernels are not built."""
    if not any(isinstance(module, PackedLinear) for module in model.modules()):
        return "a model that is not packed"
    try:
        native_model(model, positions=1)
    except ModelError as error:
        return str(error)
    return None


def load_for_decoding(path: str, *, device: torch.device | str = "cpu") -> tuple[Any, Any]:
    """(model, tokenizer) of `path` for torch; in fp32 on a CPU, where 16-bit arithmetic is slow, else in bf16.

    A latent student (the folder of a training stage) is quantised once, from its weights as they were trained; on a CPU
    to the very fp32 values that its packed form stands for, so that both write the same text (what is not quantised is
    packed in 16 bits, which a student trained in 16 bits does not feel).
    Raises ModelError, PackedError or StorageError.
    """
    place = resolve(path)
    dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    if PackedFolder.is_packed(place):
        return load_packed_model(place, dtype=dtype, device=device)
    if is_student(Path(place)):
        student, tokenizer = load_student(Path(place), dtype=saved_dtype(Path(place)), device=device)
        student.to(torch.promote_types(student.dtype, dtype))  # loses nothing of what the codes are made from
        bake(student)
        return student, tokenizer
    return load_model(place, dtype=dtype, device=device)


def stop_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Ids that end a text: the generation config's (one, several or none) and the tokenizer's end token."""
    configured = model.generation_config.eos_token_id
    several = configured if isinstance(configured, list) else [configured]
    return frozenset(token for token in (*several, tokenizer.eos_token_id) if token is not None)
