"""Any model as evaluation takes it: a packed student, the folder of a training stage, or a plain model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bitdistill_ray.evaluation.sizes import Sizes, model_sizes, packed_sizes
from bitdistill_ray.model.load import load_model
from bitdistill_ray.model.sources import OpenStorage, resolve
from bitdistill_ray.model.student import is_student, load_student, saved_dtype
from bitdistill_ray.packed.folder import PackedFolder
from bitdistill_ray.packed.model import load_packed_model
from bitdistill_ray.storage import Storage


@dataclass(frozen=True, slots=True)
class Candidate:
    """A loaded model, its tokenizer, and what it weighs on disk."""

    model: Any
    tokenizer: Any
    sizes: Sizes


def load_candidate(
    source: str, *, dtype: torch.dtype, device: torch.device, storage: OpenStorage = Storage
) -> Candidate:
    """Load `source` in `dtype`.

    A packed student multiplies by its dequantised codes.  A latent student keeps the dtype in which it was trained and
    saved: in another one, up to 1 % of its codes would be others.
    Raises ModelError, PackedError or StorageError.
    """
    place = resolve(source, storage=storage)
    if PackedFolder.is_packed(place):
        model, tokenizer = load_packed_model(place, dtype=dtype, device=device, kernels=False)
        return Candidate(model, tokenizer, packed_sizes(PackedFolder.open(place)))
    if is_student(Path(place)):
        model, tokenizer = load_student(Path(place), dtype=saved_dtype(Path(place)), device=device)
    else:
        model, tokenizer = load_model(place, dtype=dtype, device=device)
    return Candidate(model, tokenizer, model_sizes(model))
