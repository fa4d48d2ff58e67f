"""Decoding: tokens per second of one sequence and of several, and of reading a prompt.

A step reads every weight once, whatever the number of sequences, so the limit of B sequences is B times the memory
bandwidth over the model's bytes (keys and values, which a long context adds, are left out).  The model and its baseline
take turns, prompt by prompt.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bitdistill_ray.bench.limits import Place, Reader
from bitdistill_ray.bench.models import Size, save_random, save_random_packed
from bitdistill_ray.bench.report import Row, Unit
from bitdistill_ray.bench.timing import synchronize, window
from bitdistill_ray.core import QuantSpec
from bitdistill_ray.decode.loading import load_for_decoding
from bitdistill_ray.decode.torch_decoder import TorchDecoder
from bitdistill_ray.evaluation.sizes import embedding_weights, model_sizes, packed_sizes
from bitdistill_ray.model.sources import resolve
from bitdistill_ray.packed.folder import PackedFolder

ROUNDS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is decoded: `batch` sequences of `prompt_tokens`, each continued by `new_tokens`."""

    batch: int = 4
    prompt_tokens: int = 64
    new_tokens: int = 16


@dataclass(frozen=True, slots=True)
class Speed:
    """Seconds per step, and seconds to read the prompts."""

    step_s: float
    prefill_s: float


class Subject:
    """A model whose decoding is measured; `nbytes` are the stored bytes that one step reads."""

    def __init__(self, source: str, place: Place, load: Load) -> None:
        self.source, self.load, self.device = source, load, place.device
        self.model, _ = load_for_decoding(source, device=place.device)
        self.nbytes, self.format = _step_bytes(source, self.model)
        tokens = load.prompt_tokens + load.new_tokens + 1
        self.decoder = TorchDecoder(self.model, slots=load.batch, slot_tokens=tokens)

    @property
    def says(self) -> str:
        """What it is, in words."""
        return f"{Path(self.source).name} ({self.format or 'not packed'}) in {str(self.model.dtype).partition('.')[2]}"

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


def measure(source: str, baseline: str | None, load: Load, place: Place) -> list[Row]:
    """Rows of one model, beside `baseline` where one is given."""
    subjects = [Subject(name, place, load) for name in (source, *([baseline] if baseline else []))]
    reader, rows = Reader(place), []
    for batch in sorted({1, load.batch}):
        speeds: list[list[Speed]] = [[] for _ in subjects]
        reads = []
        for subject in subjects:
            subject.decode(batch)  # warm-up: kernels repack their weights at the first call
        for _ in range(ROUNDS):
            reads.append(window(reader.read, 1, place.device))
            for subject, of in zip(subjects, speeds, strict=True):
                of.append(subject.decode(batch))
        steps = [batch / median(s.step_s for s in of) for of in speeds]
        prefills = [batch * load.prompt_tokens / median(s.prefill_s for s in of) for of in speeds]
        baseline_is = subjects[1].says if baseline else None
        rows += [
            Row(
                case=f"decode, batch {batch}",
                format=subjects[0].format,
                threads=place.threads,
                metric="decode",
                unit=Unit.TOKENS_S,
                value=steps[0],
                limit=batch * reader.bandwidth(median(reads)) / subjects[0].nbytes,
                limit_is=f"the stored bytes read once a step, at the speed of {reader.says}",
                baseline=steps[1] if baseline else None,
                baseline_is=baseline_is,
            ),
            Row(
                case=f"prefill, batch {batch} x {load.prompt_tokens}",
                format=subjects[0].format,
                threads=place.threads,
                metric="prefill",
                unit=Unit.TOKENS_S,
                value=prefills[0],
                baseline=prefills[1] if baseline else None,
                baseline_is=baseline_is,
            ),
        ]
    return rows


def measure_random(specs: Sequence[QuantSpec], size: Size, load: Load, place: Place) -> list[Row]:
    """Rows of a random packed student in each format, beside the same architecture that is not packed."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        teacher = save_random(Path(folder) / str(size), size)
        for i, spec in enumerate(specs):
            packed = save_random_packed(Path(folder) / f"packed-{i}", size, spec)
            rows += measure(packed, teacher, load, place)
    return rows


def _step_bytes(source: str, model: Any) -> tuple[int, str | None]:
    """(stored bytes that one step reads, the format of a packed student).  An untied embedding is read row by row."""
    place = resolve(source)
    untied = 0 if model.config.tie_word_embeddings else embedding_weights(model)  # in 16 bits, half of both tables
    if not PackedFolder.is_packed(place):
        return model_sizes(model).bytes - untied, None
    folder = PackedFolder.open(place)
    return packed_sizes(folder).bytes - untied, format_of(folder)


def format_of(folder: PackedFolder) -> str:
    """The format of a packed student, or those that it mixes."""
    return "+".join(sorted({entry.spec.format.value for entry in folder.manifest.packed.values()}))
