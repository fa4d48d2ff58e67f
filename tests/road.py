"""The `demo` recipe at a size for tests: every stage is the real one, the model is random and tiny.

A whole road takes about 40 s on two cores, most of it the start of Ray Train's workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bitdistill_ray import recipe
from bitdistill_ray.config import Config
from tests.tiny_models import save_tiny

TINY = (
    "quant.group_size=16",
    "data.sequence_length=32",
    "data.shuffle_window=16",
    "student.micro_batch=2",
    "student.threads=1",
    "teacher.threads=1",
    "stages.write.texts=24",
    "stages.write.max_new_tokens=40",
    "stages.write.batch=8",
    "stages.write.max_repetition=1",
    "stages.write.held_out=0.2",
    "stages.clip.calibration_sequences=8",
    "stages.distill.tokens=768",
    "stages.distill.batch_sequences=4",
    "stages.distill.checkpoint_every=2",
    "stages.evaluate.context=32",
    "stages.evaluate.max_tokens=256",
    "monitor.tensorboard=false",  # a library to import for every run; `test_monitoring.py` writes its files
)


def tiny_config(root: Path, *overrides: str, case: str = "llama", run: str | None = None) -> Config:
    """The demo recipe on a tiny random model saved under `root`; later `overrides` win."""
    return recipe.load("demo", tiny_overrides(root, *overrides, case=case, run=run))


def tiny_overrides(root: Path, *overrides: str, case: str = "llama", run: str | None = None) -> Sequence[str]:
    """The same as command-line overrides."""
    teacher = root / f"teacher-{case}"
    if not teacher.exists():
        save_tiny(teacher, case)
    return (f"model.teacher={teacher}", f"run={run or root / 'run'}", *TINY, *overrides)
