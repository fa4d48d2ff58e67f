"""A ternary student as a checkpoint that stock transformers loads (`quant_method: bitnet`, AutoBitLinear).

    online   latent weights, quantised at every call: goes on training anywhere
    packed   four codes a byte and Delta: X.weight uint8 [N / 4, K], X.weight_scale [1]

A SubLN becomes the linear's `rms_norm`, which all linears have or none.  Where only o and down have one, the block's
own norms are split: normalising twice is normalising once, so the norm keeps gain 1 and its gain moves into the
`rms_norm` of the linears that read it.

    N out features   K in features
"""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from bitdistill_ray.core import Format, Granularity
from bitdistill_ray.errors import ModelError
from bitdistill_ray.model.acceleration import decoder_layers
from bitdistill_ray.model.families import family_of
from bitdistill_ray.model.linear import SUBLN_EPS, QuantLinear
from bitdistill_ray.quant import quantize
from bitdistill_ray.storage import replace_folder, storage_errors, temporary_sibling

CODES_OF_A_BYTE = 4
FAR = 1.5  # times Delta
MOST_UNITS = 8  # in the last place
ABOVE = 4e-6  # what a sum in fp32 may lose
WANTED = "one scale a matrix and 8-bit activations"


class Mode(StrEnum):
    """What is stored of a linear."""

    ONLINE = "online"
    PACKED = "packed"


def save_hf_bitnet(folder: Path, model: Any, tokenizer: Any, mode: Mode) -> None:
    """Write `model`, a causal LM with ternary QuantLinears, which stays as it is; the folder appears whole.

    Raises:
        ModelError: another format than transformers' BitNet has, or rows that do not pack.
        StorageError: a disk that refuses.
    """
    linears = {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear) and m.spec is not None}
    if not linears:
        raise ModelError("export", "the model has no quantised linear", "Quantise it first (quant.* in the recipe)")
    for name, linear in linears.items():
        _check(name, linear, mode)
    gains, moved = _gains(model, linears)
    tensors = {name: tensor.detach() for name, tensor in model.named_parameters()}  # names a tied head once
    for name, linear in linears.items():
        tensors.pop(f"{name}.norm.weight", None)
        if gains:
            tensors[f"{name}.rms_norm.weight"] = gains[name]
        tensors |= _packed(name, linear) if mode is Mode.PACKED else _latent(name, linear)
    tensors |= moved
    plain = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name not in linears]
    _write(folder, model, tokenizer, tensors, _quantization(model, mode, norms=bool(gains), plain=plain))


def _check(name: str, linear: QuantLinear, mode: Mode) -> None:
    spec = linear.spec
    assert spec is not None
    known = (Format.TERNARY, Granularity.TENSOR, 8)
    found = (spec.format, spec.granularity, spec.activation_bits)
    if found != known:
        what = f"{found[0]}, a scale for each {found[1]}, {found[2] or 16}-bit activations"
        raise ModelError(name, f"{what}; transformers' BitNet is ternary with {WANTED}",
                         "Export the packed folder, or train with quant.format=ternary quant.granularity=tensor "
                         "quant.activation_bits=8")  # fmt: skip
    if mode is Mode.PACKED and linear.out_features % CODES_OF_A_BYTE:
        raise ModelError(name, f"{linear.out_features} rows do not pack by {CODES_OF_A_BYTE}", "Use --mode online")


def _gains(model: Any, linears: dict[str, QuantLinear]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The gain of every linear's own norm (none, if no linear has one), and block norms that gave theirs away."""
    gains = {name: linear.norm.weight.detach() for name, linear in linears.items() if linear.norm is not None}
    moved: dict[str, Tensor] = {}
    if not gains or len(gains) == len(linears):
        return gains, moved
    family, names = family_of(model.config), {id(m): name for name, m in model.named_modules()}
    for layer in decoder_layers(model):
        of = {name.rpartition(".")[2]: names[id(m)] for name, m in layer.named_modules() if isinstance(m, nn.Linear)}
        for norm, leaves in ((family.attention_norm, family.linears[:3]), (family.ffn_norm, family.linears[4:6])):
            readers = [of[leaf] for leaf in leaves]
            if any(reader in gains or reader not in linears for reader in readers):
                raise ModelError(readers[0], "shares its block's norm with linears of another kind",
                                 "Quantise all linears of a block, with SubLN outputs or all")  # fmt: skip
            block_norm: Any = layer.get_submodule(norm)
            weight: Tensor = block_norm.weight.detach()
            gains |= {reader: (weight + family.gain_offset).clone() for reader in readers}
            moved[f"{names[id(layer)]}.{norm}.weight"] = torch.full_like(weight, 1 - family.gain_offset)
    lost = [name for name in linears if name not in gains]
    if lost:
        raise ModelError(lost[0], "has no norm in front of it, and others have", "Use refine.subln=all or outputs")
    return gains, moved


def _packed(name: str, linear: QuantLinear) -> dict[str, Tensor]:
    """`pack_weights` of transformers, of our codes (0, 1, 2)."""
    assert linear.spec is not None
    q = quantize(linear.weight, linear.spec, name=name)
    slabs = q.codes_NK.view(CODES_OF_A_BYTE, -1, q.codes_NK.shape[1])
    packed = sum((slab << 2 * place for place, slab in enumerate(slabs)), torch.zeros_like(slabs[0]))
    stored = {f"{name}.weight": packed, f"{name}.weight_scale": q.scale.float()}
    if linear.bias is not None:  # AutoBitLinear multiplies it by the scale too
        stored[f"{name}.bias"] = (linear.bias.detach().float() / q.scale).to(linear.bias.dtype)
    return stored


def _latent(name: str, linear: QuantLinear) -> dict[str, Tensor]:
    """Latent weights whose mean magnitude, which transformers divides by, is our scale, rounded to fp16 as it is.

    The difference of at most 1/2048 goes to weights beyond 1.5 Delta, whose codes are 1 and stay 1: in 16 bits some of
    them move by a unit in the last place or two.  A weight of exactly Delta / 2 rounds to 0, so the mean must not be
    less.
    """
    assert linear.spec is not None
    weight, scale = linear.weight.detach(), quantize(linear.weight, linear.spec, name=name).scale
    magnitude = weight.float().abs()
    missing = float(scale.double() * (1 + ABOVE) * magnitude.numel() - magnitude.double().sum())
    far = magnitude > FAR * scale
    if weight.dtype is torch.float32:
        return {f"{name}.weight": weight + weight.sign() * far * (missing / max(1, int(far.sum())))}
    units = 1
    while True:  # in bf16 one is enough, in fp16 sometimes two are
        further = (weight.view(torch.int16) + (units if missing > 0 else -units)).view(weight.dtype)
        moves = ((further.float() - weight.float()).abs() * far).double().flatten()
        if units == MOST_UNITS or float(moves.sum()) >= abs(missing):
            break
        units += 1
    so_far = moves.cumsum(0)
    chosen = (so_far - moves < missing) if missing > 0 else (so_far <= -missing)
    return {f"{name}.weight": torch.where(far & chosen.view_as(far), further, weight)}


def _quantization(model: Any, mode: Mode, *, norms: bool, plain: list[str]) -> dict[str, Any]:
    eps = {m.norm.eps for m in model.modules() if isinstance(m, QuantLinear) and m.norm is not None}
    if len(eps) > 1:
        raise ModelError("export", f"SubLNs with eps {sorted(eps)}", "transformers' BitNet has one for all")
    return {
        "quant_method": "bitnet",
        "linear_class": "autobitlinear",
        "quantization_mode": "online" if mode is Mode.ONLINE else "offline",
        "use_rms_norm": norms,
        "rms_norm_eps": next(iter(eps), SUBLN_EPS),
        "modules_to_not_convert": sorted({"lm_head", *plain}),
    }


def _write(folder: Path, model: Any, tokenizer: Any, tensors: dict[str, Tensor], quantization: dict[str, Any]) -> None:
    config = {**json.loads(model.config.to_json_string()), "quantization_config": quantization,
              "dtype": str(model.dtype).removeprefix("torch.")}  # fmt: skip
    with storage_errors(str(folder)):
        folder.parent.mkdir(parents=True, exist_ok=True)
        new = temporary_sibling(folder)
        new.mkdir()
        (new / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        model.generation_config.save_pretrained(new)
        tokenizer.save_pretrained(new)
        save_file({n: t.cpu().contiguous() for n, t in tensors.items()}, new / "model.safetensors",
                  metadata={"format": "pt"})  # fmt: skip
        replace_folder(new, folder)
