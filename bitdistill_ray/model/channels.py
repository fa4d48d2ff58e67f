"""Where a model's channels can be scaled without changing its function: a writer divided, its readers multiplied.

    norm before attention  -> q, k, v         norm before the FFN -> gate, up
    v                      -> o               up                  -> down

Heads that share a key-value head share its channels' scales (v -> o).  A linear with a SubLN in front reads that norm
and nothing else, so the SubLN's own gain is its writer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitdistill_ray.model.families import family_of
from bitdistill_ray.model.linear import QuantLinear


@dataclass(frozen=True, slots=True)
class Channels:
    """The input channels of `readers`, linears of one layer that read the same.

    divide  divides what writes them by s [K]
    tie     makes values of channels that must be scaled alike the same (the largest)
    """

    readers: tuple[nn.Linear, ...]
    divide: Callable[[Tensor], None]
    tie: Callable[[Tensor], Tensor] = lambda x_K: x_K

    @torch.no_grad()
    def scale(self, s_K: Tensor) -> None:
        """Multiply the readers' weights by s, and divide their input by it."""
        for reader in self.readers:
            reader.weight.copy_(reader.weight.float() * s_K)
        self.divide(s_K)


def scalable_channels(model: nn.Module, layer: nn.Module) -> Iterator[Channels]:
    """The places of one decoder layer of `model`, in the order in which data flows through them."""
    family, config = family_of(model.config), model.config
    linears = {name.rpartition(".")[2]: m for name, m in layer.named_modules() if isinstance(m, nn.Linear)}
    q, k, v, o, gate, up, down = (linears[name] for name in family.linears)
    for norm, readers in ((family.attention_norm, (q, k, v)), (family.ffn_norm, (gate, up))):
        yield from _read_from(readers, _gain_of(layer.get_submodule(norm), family.gain_offset))
    yield from _read_from((o,), _rows_of(v, config), _tied(config))
    yield from _read_from((down,), _rows_of(up))


def _read_from(
    readers: tuple[nn.Linear, ...], divide: Callable[[Tensor], None], tie: Callable[[Tensor], Tensor] | None = None
) -> Iterator[Channels]:
    """`readers` of one writer; those behind a SubLN each by themselves."""
    own = [reader for reader in readers if isinstance(reader, QuantLinear) and reader.norm is not None]
    for reader in own:
        yield Channels((reader,), _gain_of(reader.norm, 0.0))
    shared = tuple(reader for reader in readers if reader not in own)
    if shared and not own:  # all of them, or the writer must stay as it is
        yield Channels(shared, divide, tie) if tie else Channels(shared, divide)


def _gain_of(norm: Any, offset: float) -> Callable[[Tensor], None]:
    @torch.no_grad()
    def divide(s_K: Tensor) -> None:
        norm.weight.copy_((norm.weight.float() + offset) / s_K - offset)

    return divide


def _rows_of(linear: nn.Linear, config: Any = None) -> Callable[[Tensor], None]:
    """Divides the outputs of `linear`: of a value projection each once, whichever query heads read it."""

    @torch.no_grad()
    def divide(s_K: Tensor) -> None:
        s_N = s_K if config is None else _by_value_head(s_K, config)[:, 0].flatten()
        linear.weight.copy_(linear.weight.float() / s_N[:, None])
        if linear.bias is not None:
            linear.bias.copy_(linear.bias.float() / s_N)

    return divide


def _by_value_head(x_K: Tensor, config: Any) -> Tensor:
    """The input channels of o_proj as [key-value head, query heads that share it, C]."""
    repeats = config.num_attention_heads // config.num_key_value_heads
    return x_K.view(config.num_key_value_heads, repeats, -1)


def _tied(config: Any) -> Callable[[Tensor], Tensor]:
    def tie(x_K: Tensor) -> Tensor:
        shaped = _by_value_head(x_K, config)
        return shaped.amax(dim=1, keepdim=True).expand_as(shaped).reshape(-1)

    return tie
