"""The actor between a stage's remote part and the driver's terminal (`stages/notes.py`).

Apart from the stages, whose modules import the model's libraries: this process would wait for them for nothing.
"""

from __future__ import annotations


class Board:
    """Lines that are to be shown, and how far the work has come."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.done, self.total = 0, 0
        self.begun = False

    def begin(self) -> None:
        """The remote part has found room and runs."""
        self.begun = True

    def has_begun(self) -> bool:
        """Whether it does."""
        return self.begun

    def say(self, line: str) -> None:
        """Add a line."""
        self.lines.append(line)

    def expect(self, total: int) -> None:
        """So many things more are to be done, for the progress bar; each part of the work says it once."""
        self.total += total

    def advance(self) -> None:
        """One thing more is done."""
        self.done += 1

    def read(self, since: int) -> tuple[list[str], int, int]:
        """Lines from number `since` on, things done, things expected."""
        return self.lines[since:], self.done, self.total
