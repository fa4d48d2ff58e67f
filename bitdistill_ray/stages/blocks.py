"""A model read block by block over calibration batches: what `clip`, `gptq` and `reconstruct` look at each block with.

The whole model runs once on each batch, and only what enters its first block and the masks and positions that every
block is called with are kept.  From then on one block runs at a time, over all batches, on what the block before it
gave.  So the statistics of one block are alive at a time (full second moments of a 7B model's linears would take over
100 GB together), and a block may be measured on the outputs of blocks that are quantised already: it then sees, and can
make up for, their errors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from bitdistill_ray.core import TokenBatch
from bitdistill_ray.model.acceleration import decoder_layers
from bitdistill_ray.model.forward import hidden_states
from bitdistill_ray.model.linear import QuantLinear, plain_linears


class Statistics(Protocol):
    """What is kept of a linear's inputs."""

    def add(self, x_TK: Tensor) -> None:
        """Count these tokens."""
        ...


Kept = TypeVar("Kept", bound=Statistics)

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments of one block: positional (hidden states first) and by name."""


class Block(Generic[Kept]):
    """One decoder layer: its quantised linears by their names in the model, and the statistics of their inputs.

    For each calibration batch also `inputs` (hidden states), and `targets`: what the model in full precision has
    behind this layer, its own errors and those before it taken out.
    """

    def __init__(
        self,
        layer: nn.Module,
        linears: dict[str, QuantLinear],
        statistics: dict[str, Kept],
        *,
        inputs: Sequence[Tensor],
        targets: Sequence[Tensor],
        calls: Sequence[Call],
    ) -> None:
        self.layer, self.linears, self.statistics = layer, linears, statistics
        self.inputs, self.targets, self._calls = inputs, targets, calls

    def outputs(self, number: int) -> Tensor:
        """What the layer, quantised as it stands, makes of batch `number`."""
        return _run(self.layer, self.inputs[number], self._calls[number])


class _Recorded(Exception):  # noqa: N818  (it ends a forward pass; nothing went wrong)
    """The last block was reached: the rest of the forward pass is of no use."""


@torch.no_grad()
def blocks(
    model: nn.Module,
    batches: Sequence[TokenBatch],
    make: Callable[[QuantLinear], Kept],
    *,
    quantised_inputs: bool = False,
    chosen: Callable[[str], bool] = lambda _: True,
) -> Iterator[Block[Kept]]:
    """Each decoder layer of `model` in turn, measured over the real tokens of `batches`; the caller may change it then.

    make              an empty Statistics for a linear
    quantised_inputs  what enters a block comes from the blocks before it as the caller left them, quantised; otherwise
                      from those blocks as they were, in full precision; `Block.targets` are of the latter anyhow
    chosen            linears to measure, by name; blocks without one are passed through
    """
    device = next(model.parameters()).device
    layers = decoder_layers(model)
    names = {id(module): name for name, module in model.named_modules()}
    on_device = [batch.to(device) for batch in batches]
    calls = [_calls(model, layers, batch) for batch in on_device]
    hidden = [call[0][0][0] for call in calls]
    plain = hidden  # in full precision all the way
    for number, layer in enumerate(layers):
        own = {names[id(m)]: m for m in layer.modules() if isinstance(m, QuantLinear) and m.spec is not None}
        measured = {name: linear for name, linear in own.items() if chosen(name)}
        statistics = {name: make(linear) for name, linear in measured.items()}
        after = []
        for states, batch, call in zip(hidden, on_device, calls, strict=True):
            with plain_linears(layer), _watched(measured, statistics, batch.segment_BT >= 0):
                after.append(_run(layer, states, call[number]))
        own_calls = [call[number] for call in calls]
        if quantised_inputs:
            with plain_linears(layer):
                plain = [_run(layer, states, call) for states, call in zip(plain, own_calls, strict=True)]
        else:
            plain = after
        if measured:
            yield Block(layer, measured, statistics, inputs=hidden, targets=plain, calls=own_calls)
        if quantised_inputs:
            after = [_run(layer, states, call) for states, call in zip(hidden, own_calls, strict=True)]
        hidden = after


def _calls(model: nn.Module, layers: Sequence[nn.Module], batch: TokenBatch) -> list[Call]:
    """How every block is called on this batch; hidden states only of the first."""
    calls: list[Call] = []

    def record(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        first = args if not calls else (None, *args[1:])
        calls.append((first, named))
        if len(calls) == len(layers):
            raise _Recorded

    with ExitStack() as hooks, plain_linears(model):
        for layer in layers:
            hooks.callback(layer.register_forward_pre_hook(record, with_kwargs=True).remove)
        try:
            hidden_states(model, batch)
        except _Recorded:
            return calls
    raise AssertionError("a decoder layer was not called")


def _run(layer: nn.Module, states_BTD: Tensor, call: Call) -> Tensor:
    output = layer(states_BTD, *call[0][1:], **call[1])
    result: Tensor = output[0] if isinstance(output, tuple) else output
    return result


@contextmanager
def _watched(linears: dict[str, QuantLinear], statistics: dict[str, Kept], real_BT: Tensor) -> Iterator[None]:
    with ExitStack() as hooks:
        for name, linear in linears.items():
            hooks.callback(linear.register_forward_pre_hook(_counter(linear, statistics[name], real_BT)).remove)
        yield


def _counter(linear: QuantLinear, kept: Statistics, real_BT: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """A hook that counts what the linear's weight will multiply: its SubLN, switched off here, comes before that."""

    def count(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x_TK = inputs[0][real_BT]
        kept.add(x_TK if linear.norm is None else linear.norm(x_TK))

    return count
