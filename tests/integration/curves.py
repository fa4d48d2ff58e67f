"""Whole runs at tiny size whose rows are compared, to the last bit, with those of a run that was left alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from bitdistill_ray.storage import Storage

SEQUENCES = ("step", "first_sequence", "last_sequence", "sequences", "sequence_digest", "learning_rate", "tokens")
SAME = (*SEQUENCES, "loss", "grad_norm")
STEPS = 8
TEXT = "\n".join(f'{{"text": "the cat number {i} sat on the mat"}}' for i in range(100))
TRAIN_ONLY = ("stages.write=false", "stages.clip=false", "stages.export=false", "stages.evaluate=false")


def overrides_of(root: Path) -> tuple[str, ...]:
    """The runs that are compared: `STEPS` steps on the text in `root`, in fp32, with everything on that a step sets by
    itself (the weight of relations is measured before steps 0 and 4)."""
    return (f"data={root}/corpus.jsonl", *TRAIN_ONLY, "stages.distill.tokens=1024", "stages.distill.average=0.75",
            "stages.distill.loss.relation={weight: {every: 4}, layer: 1, heads: 4}",
            "stages.distill.quant_warmup_steps=5", "student.dtype=fp32", "teacher.dtype=fp32",
            "student.preemption_check_every=3")  # fmt: skip


def refined(alone: Path, name: str) -> Path:
    """A new run folder beside `alone`, whose `refine` stage is finished."""
    folder = alone.parent / name
    shutil.copytree(alone / "stages/refine", folder / "stages/refine")
    return folder


def rows_of(folder: Storage | Path) -> list[dict[str, Any]]:
    storage = folder if isinstance(folder, Storage) else Storage(folder)
    return [json.loads(line) for line in storage.read_bytes("metrics.jsonl").decode().splitlines()]


def same_rows(folder: Storage | Path, other: Path) -> None:
    """Equal in step, sequence ids, loss and its parts, learning rate and gradient norm, all to the last bit."""
    a, b = rows_of(folder), rows_of(other)
    parts = sorted(key for key in b[0] if key.startswith(("cakld", "ce", "relation", "quant")))
    assert [row["step"] for row in a] == list(range(STEPS))
    assert [{k: row[k] for k in (*SAME, *parts)} for row in a] == [{k: row[k] for k in (*SAME, *parts)} for row in b]


def student_of(folder: Path) -> dict[str, Tensor]:
    """The tensors of the student that the run made."""
    found: dict[str, Tensor] = load_file(folder / "stages/distill/student/model.safetensors")
    return found
