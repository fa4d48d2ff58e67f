"""Between a live student and its packed folder: `export_packed` and `load_packed_model`.

Export quantises each QuantLinear's weight in the dtype in which the model computes, through the quantiser that its
forward pass calls, so the codes on disk are those of training and evaluation bit for bit.  With `head_bits` the
embedding and the head are packed too (`packed.tables`).  Loading builds the Hugging
Face model without memory for its weights, puts a PackedLinear in the place of each packed linear and a
PackedEmbedding in that of a packed embedding, and reads the rest.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from bitdistill_ray.core import PackedWeight
from bitdistill_ray.errors import PackedError
from bitdistill_ray.model.families import family_of
from bitdistill_ray.model.linear import QuantLinear
from bitdistill_ray.model.student import StudentSurgery
from bitdistill_ray.model.taps import SDPA
from bitdistill_ray.packed.embedding import PackedEmbedding
from bitdistill_ray.packed.folder import CONFIG, TENSORS, PackedFolder
from bitdistill_ray.packed.linear import PackedLinear
from bitdistill_ray.packed.manifest import COPY_AGAIN, Layout
from bitdistill_ray.packed.tables import HeadBits, packed_tables
from bitdistill_ray.packed.weight import pack
from bitdistill_ray.quant import QuantizedTensor, block_as_group, quantize
from bitdistill_ray.storage import storage_errors

SIXTEEN_BITS = (torch.float16, torch.bfloat16)
GENERATION_CONFIG = "generation_config.json"


def export_packed(
    model: Any,
    tokenizer: Any,
    folder: str | os.PathLike[str],
    *,
    provenance: Mapping[str, Any],
    store_dtype: torch.dtype | None = None,
    head_bits: HeadBits = HeadBits.SIXTEEN,
    ternary: Layout = Layout.PLANES,
) -> PackedFolder:
    """Write a model with QuantLinears, in the dtype in which it computes, as a packed student.

    `head_bits`: of the embedding and the head; `ternary`: how codes that are one of three are stored.  What is not
    packed is stored in `store_dtype`; by default the model's own 16 bits, or fp16 for an fp32 model.
    Raises PackedError: nothing is quantised, or a value does not fit in `store_dtype`; ModelError: weights that are not
    finite; StorageError: a disk that refuses.
    """
    surgery = StudentSurgery.of(model)
    if not surgery.specs:
        raise PackedError("export", "the model has no quantised linear", "Quantise it first (quant.* in the recipe)")
    linears = {name: model.get_submodule(name) for name in surgery.specs}
    own_dtype = model.get_input_embeddings().weight.dtype
    store_dtype = store_dtype or (own_dtype if own_dtype in SIXTEEN_BITS else torch.float16)
    tables = packed_tables(model, head_bits)
    replaced = {f"{name}.{part}" for name in (*linears, *tables) for part in ("weight", "alpha")}
    return PackedFolder.write(
        folder,
        config={**json.loads(model.config.to_json_string()), "dtype": str(store_dtype).removeprefix("torch.")},
        packed={**{name: pack(block_as_group(_quantized(name, linear))) for name, linear in linears.items()}, **tables},
        tensors={
            name: _narrow(name, parameter, store_dtype)
            for name, parameter in model.named_parameters()  # names a tied tensor once
            if name not in replaced
        },
        files=_saved_files(tokenizer, model.generation_config),
        provenance=provenance,
        vocabulary=vocabulary_hash(tokenizer),
        subln=surgery.subln_eps,
        ternary=ternary,
    )


def load_packed_model(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    kernels: bool = True,
) -> tuple[Any, Any]:
    """(model in eval mode, tokenizer) of a packed student; activations and 16-bit tensors in `dtype`.

    `kernels` False multiplies by dequantised weights instead of running the compiled kernels: the reference.
    Raises PackedError for any byte that is not what was written, before it is used; KernelError.
    """
    folder = PackedFolder.open(path)
    model = _empty_model(folder, dtype)
    StudentSurgery(subln_eps=folder.manifest.subln).perform(model)
    _load_plain(model, folder, dtype)
    for name in folder.manifest.packed:
        place_packed(model, name, folder.weight(name), where=f"{folder.path / TENSORS}", kernels=kernels)
    tokenizer = AutoTokenizer.from_pretrained(folder.path)
    if vocabulary_hash(tokenizer) != folder.manifest.vocabulary:
        raise PackedError(str(folder.path), "its tokenizer does not have the vocabulary the student was trained with",
                          "Put the student's own tokenizer files back")  # fmt: skip
    return model.to(device).eval().requires_grad_(requires_grad=False), tokenizer


def place_packed(model: Any, name: str, weight: PackedWeight, *, where: str = "model", kernels: bool = True) -> None:
    """Put a PackedLinear, with its SubLN, or a PackedEmbedding in the place of the empty module `name`; in that of a
    head that is tied to the embedding too.  Raises PackedError, naming `where`, for a module of another shape.
    """
    modules = dict(model.named_modules())
    empty = modules.get(name)
    if getattr(getattr(empty, "weight", None), "shape", None) != weight.shape:
        what = f"a packed {list(weight.shape)} matrix, but the model has {empty}"
        raise PackedError(f"{where}:{name}", what, COPY_AGAIN)
    if isinstance(empty, nn.Linear):
        _replace(model, name, PackedLinear(weight, empty.bias, norm=getattr(empty, "norm", None), kernels=kernels))
    elif isinstance(empty, nn.Embedding):
        head = next((n for n, module in modules.items() if module is model.get_output_embeddings()), "")
        _replace(model, name, PackedEmbedding(weight, empty))
        if model.config.tie_word_embeddings:
            _replace(model, head, PackedLinear(weight, kernels=kernels))


def vocabulary_hash(tokenizer: Any) -> str:
    """sha256 of every token and its id."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def _quantized(name: str, linear: nn.Module) -> QuantizedTensor:
    """Codes and scales of one QuantLinear, as its forward pass sees them."""
    assert isinstance(linear, QuantLinear)
    assert linear.spec is not None
    return quantize(linear.weight, linear.spec, alpha=linear.alpha, name=name)


def _narrow(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in the 16-bit dtype in which it is stored.  Raises PackedError where a value is lost altogether."""
    narrow = tensor.detach().to(dtype)
    if not bool(torch.isfinite(narrow).all()):
        raise PackedError(name, f"has values that are not finite in {dtype}",
                          "Export with store_dtype=bfloat16, or look for a diverged run")  # fmt: skip
    return narrow


def _saved_files(*savers: Any) -> dict[str, bytes]:
    """What each `save_pretrained` writes, by path in its folder."""
    with tempfile.TemporaryDirectory() as folder, storage_errors(folder):
        for saver in savers:
            saver.save_pretrained(folder)
        found = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def _empty_model(folder: PackedFolder, dtype: torch.dtype) -> Any:
    """The Hugging Face model with its parameters on the meta device and its (computed) buffers real."""
    try:
        config = AutoConfig.for_model(**folder.config)
        family_of(config)
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=SDPA)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise PackedError(str(folder.path / CONFIG), f"gives no model with this transformers ({error})",
                          "Update transformers, or export the student again with this version") from error  # fmt: skip
    if (folder.path / GENERATION_CONFIG).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder.path)
    return model


def _load_plain(model: Any, folder: PackedFolder, dtype: torch.dtype) -> None:
    """Fill in all that is not packed.  Raises PackedError where model and folder do not have the same tensors."""
    # a copy: the memory map would still change with the file after its checksum was checked
    plain = {name: folder.tensor(name).to(dtype, copy=True) for name in folder.plain_names}
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    for name, tensor in plain.items():
        if shapes.get(name) != tensor.shape:
            what = (
                f"{list(tensor.shape)}, but the model has {list(shapes[name]) if name in shapes else 'no such tensor'}"
            )
            raise PackedError(f"{folder.path / TENSORS}:{name}", what, COPY_AGAIN)
    model.load_state_dict(plain, strict=False, assign=True)
    if model.config.tie_word_embeddings:
        model.tie_weights()
    packed = {f"{name}.weight" for name in folder.manifest.packed}
    for name, parameter in model.named_parameters():
        if parameter.is_meta and name not in packed:
            raise PackedError(f"{folder.path / TENSORS}:{name}", "is missing", COPY_AGAIN)


def _replace(model: Any, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
