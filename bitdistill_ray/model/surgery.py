"""From a teacher's architecture to a student's: which linears are quantised, and where a SubLN goes.

SubLN (BitNet Distillation, eq. 4-6) is an RMSNorm right in front of a quantised linear.  With gain 1 it destroys the
function of a pre-trained model; `calibrate_subln` starts each gain at the median RMS of what the norm is about to see,
which nearly keeps it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from bitdistill_ray.core import Granularity, QuantSpec, TokenBatch
from bitdistill_ray.errors import ConfigError
from bitdistill_ray.model.families import decoder_linears, family_of
from bitdistill_ray.model.forward import hidden_states
from bitdistill_ray.model.linear import SUBLN_EPS, QuantLinear, SubNorm, plain_linears, quant_linear, set_spec

SpecOf = Callable[[str, nn.Linear], QuantSpec | None]


class SubLN(StrEnum):
    """Which linears get a SubLN in front."""

    NONE = "none"
    OUTPUTS = "outputs"  # o_proj and down_proj: the paper's "two"
    ALL = "all"  # every projection: the authors' code, "seven"


def quantize_linears(
    model: nn.Module,
    spec: QuantSpec | SpecOf,
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = ("lm_head", "embed_tokens"),
) -> tuple[str, ...]:
    """Make the chosen linears of `model` quantise, in place, and return their names in the model's order.

    `include` (None: all) and `exclude` are shell patterns against the full name (`model.layers.0.mlp.up_proj`) or its
    leaf (`up_proj`).  `spec` is one for all, or a function of (name, linear) that returns None for one left alone.

    Raises:
        ConfigError: a pattern that matches nothing, a group longer than a row, a head tied to the embedding, nothing
            left to quantise.
    """
    spec_of: SpecOf = (lambda name, linear: spec) if isinstance(spec, QuantSpec) else spec
    modules = [name for name, _ in model.named_modules()]
    for key, patterns in (("include", include or ()), ("exclude", exclude)):
        for pattern in patterns:
            if not any(_matches(name, (pattern,)) for name in modules):
                raise ConfigError(f"quant.{key}", f"{pattern!r} matches no module",
                                  f"Names look like {modules[-1]!r} or a leaf such as 'up_proj'")  # fmt: skip
    chosen: list[tuple[str, nn.Linear, QuantSpec]] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or _matches(name, exclude):
            continue
        if include is not None and not _matches(name, include):
            continue
        wanted = spec_of(name, module)
        if wanted is not None:
            _check(model, name, module, wanted)
            chosen.append((name, module, wanted))
    if not chosen:
        raise ConfigError("quant", "no linear is left to quantise", "Widen quant.include or narrow quant.exclude")
    for _, linear, wanted in chosen:
        set_spec(linear, wanted)
    return tuple(name for name, _, _ in chosen)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, p) or fnmatchcase(name.rpartition(".")[2], p) for p in patterns)


def _check(model: nn.Module, name: str, linear: nn.Linear, spec: QuantSpec) -> None:
    size = spec.group_size or 0
    room = linear.in_features * (linear.out_features if spec.granularity is Granularity.BLOCK else 1)
    if size > room:
        raise ConfigError("quant.group_size", f"{size} is more than the {room} weights that {name} could share it over",
                          f"Use {room} or less, or quant.granularity=row")  # fmt: skip
    config: Any = model.config
    if name == family_of(config).head and config.tie_word_embeddings:
        raise ConfigError("quant.include", f"{name} shares its weight with the embedding, which is read unquantised",
                          "Add 'lm_head' to quant.exclude")  # fmt: skip


def insert_subln(model: nn.Module, placement: SubLN, *, gain: float = 1.0, eps: float = SUBLN_EPS) -> tuple[str, ...]:
    """Put a SubLN with a constant gain in front of the linears of `placement`; returns their names.

    Linears that are not quantised (yet) get one too.  See `calibrate_subln` for better gains.
    """
    family = family_of(model.config)
    leaves = {SubLN.NONE: (), SubLN.OUTPUTS: family.outputs, SubLN.ALL: family.linears}[placement]
    names = []
    for name, linear in decoder_linears(model):
        if name.rpartition(".")[2] in leaves:
            changed = quant_linear(linear)
            changed.norm = SubNorm(linear.in_features, eps=eps, dtype=linear.weight.dtype, device=linear.weight.device)
            nn.init.constant_(changed.norm.weight, gain)
            names.append(name)
    return tuple(names)


def calibrate_subln(model: nn.Module, batches: Iterable[TokenBatch]) -> dict[str, float]:
    """Set every SubLN gain to the median, over real tokens, of the RMS of that norm's input; returns them by name.

    The inputs are measured with norms and quantisation switched off, in the teacher's function, because a norm whose
    gain is still wrong would falsify all that come after it.  Every rank must be given the same batches.

    Raises:
        ConfigError: `batches` holds no real token.
    """
    rms_of: dict[str, list[Tensor]] = {}
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    with plain_linears(model) as linears, torch.no_grad():
        normed = [(name, linear) for name, linear in linears if linear.norm is not None]
        for batch in batches:
            on_device = batch.to(device)
            with _recorded_rms(normed, on_device.segment_BT >= 0, rms_of):
                hidden_states(model, on_device)
    model.train(was_training)
    gains = {name: torch.cat(parts).median().item() for name, parts in rms_of.items() if sum(map(len, parts))}
    if normed and not gains:
        raise ConfigError("refine.calibration", "no token to calibrate the SubLN gains on", "Give a corpus with text")
    for name, linear in normed:
        assert linear.norm is not None
        nn.init.constant_(linear.norm.weight, gains[name])
    return gains


@contextmanager
def _recorded_rms(
    linears: Sequence[tuple[str, QuantLinear]], real_BT: Tensor, rms_of: dict[str, list[Tensor]]
) -> Iterator[None]:
    """Inside, a forward pass appends the RMS of each linear's input, at the real tokens, to `rms_of[name]`."""

    def record(name: str, x_BTK: Tensor) -> None:
        rms_BT = x_BTK.float().square().mean(-1).sqrt()
        rms_of.setdefault(name, []).append(rms_BT[real_BT])

    handles = [
        linear.register_forward_pre_hook(lambda _, inputs, name=name: record(name, inputs[0]))
        for name, linear in linears
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
