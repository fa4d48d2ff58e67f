"""What a tracker is.  The monitor tells every tracker every row; one that fails is left out, and training goes on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol


class Tracker(Protocol):
    """Takes the rows of one training stage.  `errors` are those that its library raises when it cannot go on."""

    name: str
    errors: tuple[type[Exception], ...]

    def step(self, row: Mapping[str, Any]) -> None:
        """One optimiser step's row."""

    def rewind(self, step: int) -> None:
        """Rows from `step` on are about to be repeated."""

    def flush(self) -> None:
        """Hand over what was collected."""

    def close(self) -> None:
        """The stage has ended."""


def figures(row: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a row by name, without its step."""
    numbers = {k: v for k, v in row.items() if isinstance(v, int | float) and not isinstance(v, bool) and k != "step"}
    return {name: float(value) for name, value in numbers.items() if math.isfinite(value)}
