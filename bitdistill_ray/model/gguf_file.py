"""GGUF files as Hugging Face checkpoints: dequantised once for each dtype, and read from the cache from then on.

transformers reads GGUF block by block in Python, a quarter of a minute for 135M weights, and every process of a run
(teachers, refine, clip, evaluate) would do it again.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from bitdistill_ray import env
from bitdistill_ray.errors import ModelError
from bitdistill_ray.model.families import family_of
from bitdistill_ray.model.taps import SDPA
from bitdistill_ray.storage import storage_errors, temporary_sibling


def dequantised(file: Path, dtype: torch.dtype) -> Path:
    """A folder with the model and tokenizer of a GGUF file, the weights in `dtype`.

    It is made anew when the file's size or time changes, or transformers' version.

    Raises:
        ModelError: a family that is not supported, or tensors that are not there.
        StorageError: the cache cannot be written.
    """
    with storage_errors(str(file)):
        stat = file.stat()
    stamp = f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns} {dtype} {transformers.__version__}"
    entry = env.cache_folder() / "gguf" / f"{file.stem}-{hashlib.sha256(stamp.encode()).hexdigest()[:12]}"
    with storage_errors(str(entry)):
        entry.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{entry}.lock"):
        if not entry.exists():
            model, tokenizer = _read(file, dtype)
            new = temporary_sibling(entry)
            with storage_errors(str(entry)):
                model.save_pretrained(new)
                tokenizer.save_pretrained(new)
                new.rename(entry)
    return entry


def _read(file: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    place, options = str(file.parent), {"gguf_file": file.name}
    family_of(AutoConfig.from_pretrained(place, **options))
    tokenizer = AutoTokenizer.from_pretrained(place, **options)
    model, found = AutoModelForCausalLM.from_pretrained(
        place, **options, **_without_packed_blocks(), dtype=dtype, attn_implementation=SDPA, output_loading_info=True
    )
    if found["missing_keys"]:
        lost = sorted(found["missing_keys"])
        raise ModelError(str(file), f"lacks {len(lost)} tensors, such as {lost[0]}", "Get the file again")
    for owner, name in ((model.config, "quantization_config"), (model, "hf_quantizer"), (model, "quantization_method")):
        if hasattr(owner, name):
            delattr(owner, name)  # it may be trained and saved like any other now
    model.is_quantized = False
    return model, tokenizer


def _without_packed_blocks() -> dict[str, Any]:
    """Newer transformers would keep GGUF blocks packed where it has kernels for them; ask it not to."""
    try:
        from transformers import GgufConfig
    except ImportError:  # transformers that always dequantises
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}
