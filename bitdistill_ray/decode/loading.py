"""From a path to a model that decodes: a packed student with its kernels, a latent student, or any model source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bitdistill_ray.model.linear import bake
from bitdistill_ray.model.load import load_model
from bitdistill_ray.model.sources import resolve
from bitdistill_ray.model.student import is_student, load_student, saved_dtype
from bitdistill_ray.packed.folder import PackedFolder
from bitdistill_ray.packed.model import load_packed_model


def load_for_decoding(path: str, *, device: torch.device | str = "cpu") -> tuple[Any, Any]:
    """(model, tokenizer) of `path`; in fp32 on a CPU, where 16-bit arithmetic is slow, else in bf16.

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
