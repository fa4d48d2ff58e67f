"""Decoding: tokens per second of one sequence and of several, of reading a prompt, and the memory that it takes.

A step reads every weight once, whatever the number of sequences, so the limit of B sequences is B times the memory
bandwidth over the model's bytes (keys and values, which a long context adds, are left out).  The model and its baseline
take turns, prompt by prompt.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

from bitdistill_ray.bench.limits import Place, Reader
from bitdistill_ray.bench.models import Size, save_random, save_random_packed
from bitdistill_ray.bench.report import Row, Unit
from bitdistill_ray.bench.subject import Load, Speed, Subject
from bitdistill_ray.bench.timing import window
from bitdistill_ray.core import QuantSpec

ROUNDS = 5


def measure(source: str, baseline: str | None, load: Load, place: Place) -> list[Row]:
    """Rows of one model, beside `baseline` where one is given."""
    return _rows([Subject.open(name, place, load) for name in (source, *([baseline] if baseline else []))], place)


def measure_shape(
    shape: str, specs: Sequence[QuantSpec | None], load: Load, place: Place, *, head_bits: int = 16
) -> list[Row]:
    """Rows of a known shape with random weights in each format (None: 16 bits), beside the same in 16 bits.

    `head_bits` is that of the packed ones.
    """
    rows: list[Row] = []
    for spec in specs:
        plain = Subject.of_shape(shape, None, place, load)
        packed = [Subject.of_shape(shape, spec, place, load, head_bits=head_bits)] if spec else []
        rows += _rows([*packed, plain], place)
    return rows


def _rows(subjects: Sequence[Subject], place: Place) -> list[Row]:
    """Of the first subject, beside the second where there is one."""
    load, baseline = subjects[0].load, len(subjects) > 1
    baseline_is = subjects[1].says if baseline else None
    rows = _memory(subjects, place)
    reader = Reader(place)
    for batch in sorted({1, load.batch}):
        speeds: list[list[Speed]] = [[] for _ in subjects]
        reads = []
        for subject in subjects:
            subject.decode(batch)  # warm-up: kernels repack their weights at the first call
        for _ in range(ROUNDS):
            reads.append(reader.best({name: window(way, 1, place.device) for name, way in reader.ways.items()}))
            for subject, of in zip(subjects, speeds, strict=True):
                of.append(subject.decode(batch))
        steps = [batch / median(s.step_s for s in of) for of in speeds]
        prefills = [batch * load.prompt_tokens / median(s.prefill_s for s in of) for of in speeds]
        rows += [
            Row(
                case=f"decode, batch {batch}",
                format=subjects[0].format,
                threads=place.threads,
                metric="decode",
                unit=Unit.TOKENS_S,
                value=steps[0],
                limit=batch * median(reads) / subjects[0].nbytes,
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


def _memory(subjects: Sequence[Subject], place: Place) -> list[Row]:
    """What a step reads, and what lies in memory."""
    figures: dict[tuple[str, str], Callable[[Subject], int | None]] = {
        ("bytes per token", "weights"): lambda subject: subject.nbytes,
        ("keys and values", "cache"): lambda subject: subject.cache_bytes,
        ("resident memory", "resident"): lambda subject: subject.resident,
    }
    rows = []
    for (case, metric), figure in figures.items():
        values = [figure(subject) for subject in subjects]
        if values[0] is not None:
            rows.append(
                Row(
                    case=case,
                    format=subjects[0].format,
                    threads=place.threads,
                    metric=metric,
                    unit=Unit.MIB,
                    value=values[0] / 2**20,
                    baseline=values[1] / 2**20 if len(values) > 1 and values[1] is not None else None,
                    baseline_is=subjects[1].says if len(values) > 1 else None,
                )
            )
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
