"""The mean of a student's weights over the last steps of a stage, published in place of the last step's weights.

Averaging takes out what the noise of the last steps did, as a smaller learning rate would (SWA, arXiv
1803.05407).  The sums are fp32, on the student's device; they travel in checkpoints, so that a resumed run averages the
same steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

State = dict[str, Any]


class WeightAverage:
    """`add` after every step; `tensors` at the end."""

    def __init__(self, model: nn.Module, *, steps: int, share: float) -> None:
        """The mean over the last `share` of `steps` steps, the last one at least."""
        self._model, self.first = model, min(steps - 1, round(steps * (1 - share)))
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    @torch.no_grad()
    def add(self, done: int) -> None:
        """`done` steps are over: count the weights as they are, if it is time."""
        if done <= self.first:
            return
        for name, parameter in self._model.named_parameters():
            if name in self._sums:
                self._sums[name] += parameter
            else:
                self._sums[name] = parameter.detach().to(torch.float32, copy=True)
        self._count += 1

    def tensors(self) -> dict[str, Tensor]:
        """The means by parameter name, on the CPU, in the parameters' dtype."""
        dtypes = {name: parameter.dtype for name, parameter in self._model.named_parameters()}
        return {name: (total / self._count).to(dtypes[name]).cpu() for name, total in self._sums.items()}

    def state(self) -> State:
        """For a checkpoint."""
        return {"count": self._count, "sums": {name: total.cpu() for name, total in self._sums.items()}}

    def load(self, state: State) -> None:
        """Go on from what `state` gave."""
        device = next(self._model.parameters()).device
        self._count = state["count"]
        self._sums = {name: total.to(device) for name, total in state["sums"].items()}
