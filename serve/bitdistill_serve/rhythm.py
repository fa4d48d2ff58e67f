"""How many prompt tokens may be read between two steps, by how long both take here.

Who reads a stream notices its longest pauses.  A chunk that a GPU reads within a step takes a CPU ten steps' time, so
the number cannot be a constant: it is what takes `MOST_STALL` steps, by running means of both times.
"""

from __future__ import annotations

MOST_STALL = 1.25  # of a step's time; with the step itself a pause is 2.25 times the usual one
LEAST_TOKENS = 32  # fewer cost nearly as much: a pass over the weights
NEWEST_WEIGHT = 0.2  # of the newest call


class Rhythm:
    """Seconds of a step and of a prompt's token."""

    def __init__(self) -> None:
        self._step_s = self._token_s = 0.0

    def stepped(self, seconds: float) -> None:
        """One step took so long."""
        self._step_s += (seconds - self._step_s) * (NEWEST_WEIGHT if self._step_s else 1.0)

    def read(self, tokens: int, seconds: float) -> None:
        """Reading so many tokens took so long."""
        self._token_s += (seconds / tokens - self._token_s) * (NEWEST_WEIGHT if self._token_s else 1.0)

    def tokens_beside_a_step(self, most: int) -> int:
        """What may be read beside a step, `most` at the utmost and while nothing is known."""
        if not self._step_s or not self._token_s:
            return most
        return min(most, max(LEAST_TOKENS, int(MOST_STALL * self._step_s / self._token_s)))
