"""From a student folder on disk to a packed folder on disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitdistill_ray.model.student import load_student, saved_dtype
from bitdistill_ray.packed.manifest import Layout
from bitdistill_ray.packed.model import export_packed
from bitdistill_ray.packed.tables import HeadBits


def pack_student(
    source: Path,
    folder: Path,
    about: Mapping[str, Any],
    *,
    head_bits: HeadBits = HeadBits.SIXTEEN,
    ternary: Layout = Layout.PLANES,
) -> None:
    """Pack the student folder `source`, in the dtype in which its latents were trained and saved, into `folder`."""
    model, tokenizer = load_student(source, dtype=saved_dtype(source))
    export_packed(model, tokenizer, folder, provenance=about, head_bits=head_bits, ternary=ternary)
