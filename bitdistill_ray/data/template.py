"""How a row of a task becomes a prompt and its answer: the same for what trains on it and for what measures it.

prompt   the text with the row's columns in the place of its `{column}` fields
answer   the answer column's text; with words, those of the value that stands there (a label)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from string import Formatter
from typing import Any

from bitdistill_ray.errors import ConfigError, DataError


@dataclass(frozen=True, slots=True)
class Template:
    """`words` are (value, words) pairs, in the order of the labels."""

    text: str
    answer_column: str
    words: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        for name in self.fields:
            if not name.isidentifier():
                raise ConfigError("template", f"the field {{{name}}}", "Write {column}, and {{ for a brace")

    @property
    def fields(self) -> tuple[str, ...]:
        """The columns that the text names, each once."""
        return tuple(dict.fromkeys(name for _, name, _, _ in Formatter().parse(self.text) if name is not None))

    def prompt(self, row: Mapping[str, Any], where: str) -> str:
        """Raises DataError, naming `where`, for a column that the row does not have."""
        try:
            return self.text.format(**{name: "" if row[name] is None else row[name] for name in self.fields})
        except KeyError as missing:
            raise DataError(where, f"no column {missing}, which the template names", _columns(row)) from None

    def answer(self, row: Mapping[str, Any], where: str) -> str:
        """Raises DataError, naming `where`, for a column that is not there and a label without words."""
        if self.answer_column not in row:
            raise DataError(where, f"no column {self.answer_column!r}", _columns(row))
        value = row[self.answer_column]
        return self.words[self.label(row, where)][1] if self.words else "" if value is None else str(value)

    def label(self, row: Mapping[str, Any], where: str) -> int:
        """The number of the row's label; raises as `answer` does."""
        if self.answer_column not in row:
            raise DataError(where, f"no column {self.answer_column!r}", _columns(row))
        known, value = [value for value, _ in self.words], str(row[self.answer_column])
        if value not in known:
            raise DataError(where, f"{self.answer_column} {value!r}, and the labels are {', '.join(known)}",
                            "Give it words among the labels, or leave the row out")  # fmt: skip
        return known.index(value)


def _columns(row: Mapping[str, Any]) -> str:
    return f"Columns: {', '.join(sorted(row))}"
