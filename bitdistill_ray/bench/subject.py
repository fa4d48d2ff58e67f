"""A model whose decoding is measured: its decoder, the bytes that a step reads, the memory it takes.

On a CPU whatever the native decoder supports runs there, full precision in 16 bits too: so that a packed student and
the model it came from are compared on the same runtime.
"""

from __future__ import annotations

import ctypes
import gc
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from bitdistill_kernels.decoder import CacheType
from bitdistill_ray.bench.limits import Place
from bitdistill_ray.bench.shapes import random_of_shape
from bitdistill_ray.bench.timing import synchronize, window
from bitdistill_ray.core import QuantSpec
from bitdistill_ray.decode.base import Decoder
from bitdistill_ray.decode.loading import load_decoder, load_for_decoding
from bitdistill_ray.decode.native_decoder import NativeDecoder
from bitdistill_ray.decode.torch_decoder import TorchDecoder
from bitdistill_ray.errors import ModelError
from bitdistill_ray.evaluation.sizes import model_sizes
from bitdistill_ray.model.load import load_model
from bitdistill_ray.model.sources import resolve
from bitdistill_ray.model.student import is_student
from bitdistill_ray.packed.folder import PackedFolder
from bitdistill_ray.packed.linear import PackedLinear
from bitdistill_ray.packed.summary import is_table
from bitdistill_ray.packed.tables import HeadBits

SIXTEEN_BITS = torch.float16


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is decoded: `batch` sequences of `prompt_tokens`, each continued by `new_tokens`."""

    batch: int = 4
    prompt_tokens: int = 128
    new_tokens: int = 32
    cache: CacheType = CacheType.FP16
    activation_bits: int | None = None
    """8: of weight-only students, which leave them open."""

    @property
    def slot_tokens(self) -> int:
        return self.prompt_tokens + self.new_tokens + 1


@dataclass(frozen=True, slots=True)
class Speed:
    """Seconds per step, and seconds to read the prompts."""

    step_s: float
    prefill_s: float


class Subject:
    """`nbytes` are the canonical bytes that one step reads, `resident` what its memory grew by in this process."""

    def __init__(self, name: str, model: Any, place: Place, load: Load) -> None:
        self.load, self.device = load, place.device
        self.nbytes, self.format = step_bytes(model), _format(model)
        self.decoder, how = _decoder(model, load)
        self.says = f"{name} ({self.format or 'not packed'}) in {str(model.dtype).partition('.')[2]}, {how}"
        self.resident = 0

    @classmethod
    def open(cls, source: str, place: Place, load: Load) -> Self:
        """Of a model source."""
        before, found = resident_bytes(), resolve(source)
        plain = not PackedFolder.is_packed(found) and not is_student(Path(found))
        if place.device.type != "cpu":
            model, _ = load_for_decoding(source, device=place.device)
        elif plain:
            model, _ = load_model(found, dtype=SIXTEEN_BITS, device=place.device)
        else:
            model, _ = load_decoder(source)
        subject = cls(Path(source).name, model, place, load)
        del model
        return subject._settled(before)

    @classmethod
    def of_shape(cls, shape: str, spec: QuantSpec | None, place: Place, load: Load, *, head_bits: int = 16) -> Self:
        """Of a known shape, with random weights; `head_bits` 4 or 8 packs the embedding and the head."""
        before = resident_bytes()
        model = random_of_shape(shape, spec, head_bits=HeadBits(head_bits))
        subject = cls(shape, model, place, load)
        del model
        return subject._settled(before)

    def _settled(self, before: int) -> Self:
        """Warm, and its memory measured: what the process holds more than `before`."""
        self.decode(1)
        gc.collect()
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # what glibc keeps for later is not the model's
            trim(0)
        self.resident = max(resident_bytes() - before, os.sysconf("SC_PAGE_SIZE"))
        return self

    @property
    def cache_bytes(self) -> int | None:
        """Of keys and values, where the decoder knows."""
        return self.decoder.cache_bytes if isinstance(self.decoder, NativeDecoder) else None

    def decode(self, batch: int) -> Speed:
        """Read `batch` prompts and continue them; the last prompt token is not timed apart."""
        decoder, load = self.decoder, self.load
        prompts = torch.randint(decoder.vocab_size, (batch, load.prompt_tokens)).tolist()
        slots = [decoder.admit(prompt) for prompt in prompts]
        try:
            synchronize(self.device)
            began = time.perf_counter()
            decoder.prefill(slots, load.prompt_tokens)
            synchronize(self.device)
            prefill_s = time.perf_counter() - began
            step_s = window(lambda: decoder.step(slots, [1] * batch), load.new_tokens, self.device)
        finally:
            for slot in slots:
                decoder.free(slot)
        return Speed(step_s, prefill_s)


def step_bytes(model: Any) -> int:
    """Canonical bytes that one step reads: packed tensors, all else in 16 bits, of an untied embedding only rows."""
    embedding = model.get_input_embeddings()
    looked_up = isinstance(embedding, nn.Embedding) and not model.config.tie_word_embeddings
    untied = 2 * embedding.weight.numel() if looked_up else 0
    packed = [module.packed for module in model.modules() if isinstance(module, PackedLinear)]
    if not packed:
        return model_sizes(model).bytes - untied
    plain: int = 2 * sum(parameter.numel() for parameter in model.parameters())
    return plain - untied + sum(t.nbytes for p in packed for t in (p.codes, p.scales, p.zeros) if t is not None)


def resident_bytes() -> int:
    """Memory of this process that is in RAM now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def format_of(folder: PackedFolder) -> str:
    """The format of a packed student's linears, or those that they mix."""
    entries = folder.manifest.packed.items()
    return "+".join(sorted({entry.spec.format.value for name, entry in entries if not is_table(name)}))


def _format(model: Any) -> str | None:
    packed = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    formats = {module.packed.spec.format.value for name, module in packed.items() if not is_table(name)}
    return "+".join(sorted(formats)) or None


def _decoder(model: Any, load: Load) -> tuple[Decoder, str]:
    """A decoder for the model, the native one where it can, and which it is."""
    slots, tokens = load.batch, load.slot_tokens
    if model.device.type == "cpu":
        try:
            native = NativeDecoder(model, slots=slots, slot_tokens=tokens, cache=load.cache,
                                   activation_bits=load.activation_bits)  # fmt: skip
            return native, "native"
        except ModelError:
            model.float()
    return TorchDecoder(model, slots=slots, slot_tokens=tokens), "torch"
