"""Loading a causal LM and its tokenizer from any source.

Whatever the source, the result is a dense model of a supported family in one dtype, with sdpa attention (whose masks
keep packed documents apart; flash attention's do not).  GGUF files are dequantised (`gguf_file.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from bitdistill_ray.errors import ModelError
from bitdistill_ray.model.families import family_of
from bitdistill_ray.model.gguf_file import dequantised
from bitdistill_ray.model.sources import OpenStorage, resolve
from bitdistill_ray.model.taps import SDPA
from bitdistill_ray.storage import Storage


def load_model(
    source: str,
    *,
    dtype: torch.dtype,
    device: torch.device | str | None = None,
    spread: str | Mapping[str, Any] | None = None,
    storage: OpenStorage = Storage,
) -> tuple[Any, Any]:
    """(model in eval mode, tokenizer) of a source as `model.sources.resolve` understands it.

    `spread` puts layers on several devices, in place of `device`: accelerate's name for a way (`balanced`: as many
    bytes on each GPU of this process) or a map from modules to devices.  Hooks then bring to a layer what it reads.

    Raises:
        ModelError: nothing there, files that cannot be read, a family that is not supported, a tokenizer that makes ids
            beyond the model's vocabulary.
        StorageError: an object store that refuses.
    """
    options = {} if spread is None else {"device_map": spread}
    try:
        place = readable(source, dtype=dtype, storage=storage)
        family_of(AutoConfig.from_pretrained(place))
        tokenizer = AutoTokenizer.from_pretrained(place)
        model, found = AutoModelForCausalLM.from_pretrained(
            place, **options, dtype=dtype, attn_implementation=SDPA, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        said = " ".join(str(error).split())
        remedy = "Check the name, the network and HF_TOKEN, or give a folder that holds the whole model"
        raise ModelError(source, f"cannot be loaded: {said}", remedy) from error
    if found["missing_keys"]:
        lost = sorted(found["missing_keys"])
        raise ModelError(source, f"lacks {len(lost)} tensors, such as {lost[0]}", "Get its files again")
    check_tokenizer(source, model, tokenizer)
    return (model if device is None or spread is not None else model.to(device)).eval(), tokenizer


def readable(source: str, *, dtype: torch.dtype, storage: OpenStorage = Storage) -> str:
    """A folder (or a hub's id) with the source's model and tokenizer as transformers reads them; a GGUF file is
    dequantised to `dtype`.

    Raises ModelError or StorageError.
    """
    place = resolve(source, storage=storage)
    return str(dequantised(Path(place), dtype)) if place.endswith(".gguf") else place


def check_tokenizer(source: str, model: Any, tokenizer: Any) -> None:
    """Refuse a tokenizer whose ids the model's embedding does not have.

    Raises:
        ModelError: names both and their sizes.
    """
    largest, rows = max(tokenizer.get_vocab().values()), model.get_input_embeddings().num_embeddings
    if largest >= rows:
        what = (
            f"its tokenizer ({tokenizer.name_or_path}) makes ids up to {largest}, but its model has {rows} embeddings"
        )
        raise ModelError(source, what, "Put the tokenizer beside the model it was trained with")
