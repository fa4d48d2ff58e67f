"""A student on disk: latent weights, and what was done to its teacher's architecture.

    model.safetensors    the latent weights: with config.json and the tokenizer a plain Hugging Face checkpoint
    surgery.safetensors  the gains of SubLN (`X.norm.weight`) and the scales of learnable formats (`X.alpha`)
    bitdistill.json      the surgery (a QuantSpec for each linear, the SubLNs) and the provenance

What is saved are latent weights; the codes come from them again on loading, through the one quantiser, and are the same
in the dtype they were trained in.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bitdistill_ray.core import QuantSpec
from bitdistill_ray.errors import ModelError
from bitdistill_ray.model.linear import QuantLinear, SubNorm, quant_linear, set_spec
from bitdistill_ray.model.load import load_model
from bitdistill_ray.storage import replace_folder, storage_errors, temporary_sibling

VERSION = 1
SURGERY_FILE = "bitdistill.json"
LATENT_FILE = "model.safetensors"
ADDED_FILE = "surgery.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentSurgery:
    """What makes a student of a plain model: the spec of each quantised linear and the eps of each SubLN, by name."""

    specs: Mapping[str, QuantSpec] = field(default_factory=dict)
    subln_eps: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module) -> StudentSurgery:
        """What was done to `model`."""
        linears = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
        return cls(
            specs={name: linear.spec for name, linear in linears.items() if linear.spec is not None},
            subln_eps={name: linear.norm.eps for name, linear in linears.items() if linear.norm is not None},
        )

    def perform(self, model: nn.Module) -> None:
        """Do the same to `model`, in place: gains start at 1, alphas at their statistics.

        Raises:
            ModelError: the model has no linear of a name.
        """
        linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        for name in (*self.specs, *self.subln_eps):
            if name not in linears:
                raise ModelError(name, "the model has no such linear", "Use the architecture the student was made of")
        for name, eps in self.subln_eps.items():
            linear, weight = quant_linear(linears[name]), linears[name].weight
            linear.norm = SubNorm(linear.in_features, eps=eps, dtype=weight.dtype, device=weight.device)
        for name, spec in self.specs.items():
            set_spec(linears[name], spec)

    def added_parameters(self) -> set[str]:
        """Names of the parameters that the plain model does not have."""
        learnable = {f"{name}.alpha" for name, spec in self.specs.items() if spec.format.learns_scale}
        return learnable | {f"{name}.norm.weight" for name in self.subln_eps}

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; `from_dict` is its inverse."""
        return {"specs": {n: s.to_dict() for n, s in self.specs.items()}, "subln_eps": dict(self.subln_eps)}

    @classmethod
    def from_dict(cls, surgery: Mapping[str, Any]) -> StudentSurgery:
        """Read what `to_dict` wrote."""
        specs = {name: QuantSpec.from_dict(spec) for name, spec in surgery["specs"].items()}
        return cls(specs=specs, subln_eps=dict(surgery["subln_eps"]))


def is_student(folder: Path) -> bool:
    """True for a folder that `save_student` wrote."""
    return (folder / SURGERY_FILE).is_file()


def save_student(
    folder: Path,
    model: Any,
    tokenizer: Any,
    *,
    tensors: Mapping[str, Tensor] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Write a student; the folder appears whole and replaces what was there.

    `tensors` are the latent weights by name where `model` does not hold them whole or in full precision (the gathered
    fp32 master weights of DeepSpeed); default: the model's own.  `provenance` is any JSON: teacher, recipe, commit.

    Raises:
        ModelError: `tensors` lacks a parameter of the model.
        StorageError: a disk that refuses.
    """
    owned = dict(model.named_parameters())  # a tied head is not named twice
    given = owned if tensors is None else tensors
    for name in owned:
        if name not in given:
            raise ModelError(name, "is missing among the tensors to save", "Gather all parameters before saving")
    surgery = StudentSurgery.of(model)
    added = surgery.added_parameters()
    about = {"version": VERSION, "surgery": surgery.to_dict(), "provenance": dict(provenance or {})}
    temporary = temporary_sibling(folder)
    with storage_errors(str(folder)):
        try:
            temporary.mkdir(parents=True)
            weights = {name: given[name].detach().cpu().contiguous() for name in owned}
            latent = {name: tensor for name, tensor in weights.items() if name not in added}
            save_file(latent, temporary / LATENT_FILE, metadata={"format": "pt"})
            save_file({name: weights[name] for name in sorted(added)}, temporary / ADDED_FILE)
            model.config.save_pretrained(temporary)
            model.generation_config.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            (temporary / SURGERY_FILE).write_text(json.dumps(about, indent=1), encoding="utf-8")
            replace_folder(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def saved_dtype(folder: Path) -> torch.dtype:
    """The dtype of the latent weights in `folder`: the one they were trained in."""
    with storage_errors(str(folder)), safe_open(folder / LATENT_FILE, framework="pt") as file:
        dtype: torch.dtype = file.get_tensor(next(iter(file.keys()))).dtype
    return dtype


def load_student(folder: Path, *, dtype: torch.dtype, device: torch.device | str | None = None) -> tuple[Any, Any]:
    """(model in eval mode with its surgery redone, tokenizer) of a folder that `save_student` wrote.

    Raises:
        ModelError: not such a folder, or one whose tensors and surgery do not belong together.
    """
    surgery = StudentSurgery.from_dict(read_about(folder)["surgery"])
    model, tokenizer = load_model(str(folder), dtype=dtype)
    surgery.perform(model)
    try:
        added = load_file(folder / ADDED_FILE)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{folder}/{ADDED_FILE}", f"cannot be read ({error})", "Save the student again") from error
    if set(added) != surgery.added_parameters():
        odd = sorted(set(added) ^ surgery.added_parameters())[0]
        what = f"{odd} is in one of {ADDED_FILE} and {SURGERY_FILE} only"
        raise ModelError(str(folder), what, "Save the student again")
    with torch.no_grad():
        for name, tensor in added.items():
            model.get_parameter(name).copy_(tensor)
    return (model if device is None else model.to(device)).eval(), tokenizer


def read_about(folder: Path) -> dict[str, Any]:
    """`bitdistill.json`: version, surgery, provenance.

    Raises:
        ModelError: there is none, it is damaged, or a newer version wrote it.
    """
    file = folder / SURGERY_FILE
    try:
        about: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        remedy = "Give the folder of a student, not of a plain model"
        raise ModelError(str(folder), f"has no {SURGERY_FILE}", remedy) from None
    except ValueError as error:
        raise ModelError(str(file), f"is not JSON ({error})", "Save the student again") from None
    if about.get("version") != VERSION:
        what = f"is of version {about.get('version')}, and this reads {VERSION}"
        raise ModelError(str(file), what, "Update bitdistill-ray")
    return about
