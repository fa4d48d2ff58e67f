"""What decoder layers give, read during an ordinary forward pass.

Inside `layer_taps` a layer stands in a shell that calls it and keeps its output.  The shell is around a compiled layer,
not in it: a hook would be compiled with the layer it hangs on, once for every layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bitdistill_ray.core import LayerStates
from bitdistill_ray.errors import ModelError
from bitdistill_ray.model.acceleration import decoder_layers


class LayerTaps:
    """What the last forward pass left; `states` may be asked for after it."""

    def __init__(self, layers: Sequence[int]) -> None:
        self.layers = tuple(layers)
        self.outputs: dict[int, Tensor] = {}

    def states(self, device: torch.device | None = None) -> LayerStates | None:
        """The outputs on one device (None: where they are), with gradients; None where no layer is tapped."""
        if not self.layers:
            return None
        outputs = [self.outputs[layer] if device is None else self.outputs[layer].to(device) for layer in self.layers]
        return LayerStates(layers=self.layers, hidden_BLTD=torch.stack(outputs, dim=1))


@contextmanager
def layer_taps(model: nn.Module, layers: Sequence[int]) -> Iterator[LayerTaps]:
    """Inside, a forward pass of `model` leaves the outputs of `layers` (negative: from the end) in what this yields.

    Raises:
        ModelError: a layer that the model does not have.
    """
    own = decoder_layers(model)
    for layer in layers:
        if not -len(own) <= layer < len(own):
            raise ModelError(f"layer {layer}", f"the model has {len(own)} layers", "Choose one of 0 to last")
    taps = LayerTaps([layer % len(own) for layer in layers])
    places = [_place(model, own[layer]) for layer in dict.fromkeys(taps.layers)]
    try:
        for layer, (parent, name) in zip(dict.fromkeys(taps.layers), places, strict=True):
            parent._modules[name] = _Shell(own[layer], taps.outputs, layer)
        yield taps
    finally:
        for layer, (parent, name) in zip(dict.fromkeys(taps.layers), places, strict=True):
            parent._modules[name] = own[layer]


def _place(model: nn.Module, layer: nn.Module) -> tuple[nn.Module, str]:
    path = next(name for name, module in model.named_modules() if module is layer)
    parent, _, name = path.rpartition(".")
    return model.get_submodule(parent), name


class _Shell(nn.Module):
    """A layer whose output is kept; whatever else is asked of it, the layer answers."""

    def __init__(self, layer: nn.Module, outputs: dict[int, Tensor], number: int) -> None:
        super().__init__()
        self.layer, self._outputs, self._number = layer, outputs, number

    def forward(self, *args: Any, **named: Any) -> Any:
        output = self.layer(*args, **named)
        self._outputs[self._number] = output[0] if isinstance(output, tuple) else output
        return output

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)
