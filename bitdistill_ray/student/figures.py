"""Numbers on their way from the device to the host, read without waiting for what the device was given afterwards.

A tensor that is read with `.tolist()` is copied behind everything in its stream.  Read one step late, it would wait for
that next step too, and the device then for Python.  So the copy is put into the stream when the numbers are, and an
event says when it is over.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class Figures:
    """Scalars by name; `read` waits for them alone."""

    def __init__(self, scalars: Mapping[str, Tensor]) -> None:
        self._names = list(scalars)
        made = torch.stack([scalar.detach().double() for scalar in scalars.values()])
        self._there: torch.cuda.Event | None = None
        if made.is_cuda:
            self._values = torch.empty(made.shape, dtype=made.dtype, pin_memory=True).copy_(made, non_blocking=True)
            self._there = torch.cuda.current_stream(made.device).record_event()
        else:
            self._values = made

    def read(self) -> dict[str, float]:
        """The numbers; a float32 comes as it was."""
        if self._there is not None:
            self._there.synchronize()
        return dict(zip(self._names, self._values.tolist(), strict=True))
