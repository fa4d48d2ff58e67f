"""What a model writes when it calls functions, read back while it grows: text here, calls there.

Models write a call as JSON with its name and its arguments (Llama 3: `parameters`): between tags, one call or a list of
them (Qwen, SmolLM2), or as the whole answer (Llama 3).  A call is told when it is whole and names a function that was
offered; anything else stays text, to the letter, so nothing that a model wrote is lost.  White space that only sets a
call apart is dropped.  How the text is chopped into pieces changes nothing (`tests/serve/test_tool_calls.py`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any, NoReturn

from bitdistill_serve.errors import printable

_SEPARATOR = re.compile(r"[\s;]*")  # between calls that follow each other


@dataclass(frozen=True, slots=True)
class Call:
    """A function, and its arguments as the text of a JSON object."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Tag:
    """What stands around calls, such as `<tool_call>` and `</tool_call>`."""

    open: str
    close: str


@dataclass(frozen=True, slots=True)
class Read:
    """What an answer grew by."""

    text: str = ""
    calls: tuple[Call, ...] = ()


class _State(Enum):
    START = "nothing but white space so far"
    TEXT = "outside of a call"
    CALL = "inside of a tag, or of an answer that begins as JSON does"


class CallReader:
    """Reads one answer; `tag` is None for a model that writes calls without one.  Calls beyond `most` are dropped."""

    def __init__(self, names: frozenset[str], tag: Tag | None, *, most: int | None = None) -> None:
        self._names, self._tag, self._most = names, tag, most
        self._state = _State.START
        self._held = ""  # read and not told: in a call all since its beginning, white space before it included
        self._told = 0
        self._end = re.compile(rf'"(?:[^"\\]|\\.)*(?:"|\\?\Z)|{re.escape(tag.close)}', re.DOTALL) if tag else None

    @property
    def called(self) -> bool:
        """Whether the answer has a call so far."""
        return self._told > 0

    def push(self, text: str) -> Read:
        """Take more text; tell what is certain of it."""
        self._held += text
        return self._joined(self._certain())

    def finish(self) -> Read:
        """Tell the rest: an end may stand for the closing tag."""
        rest = self._joined(self._certain())
        held, self._held = self._held, ""
        last = self._calls_or_text(held, closed=False) if self._state is _State.CALL else None
        if last is None:
            last = Read("" if self.called and held.isspace() else held)
        return self._joined(iter((rest, last)))

    def _certain(self) -> Iterator[Read]:
        while True:
            if self._state is _State.START:
                if not (begin := self._held.lstrip(" \t\n\r")):  # what JSON and the grammars skip
                    return
                bare = self._tag is None and begin[0] in "{["
                self._state = _State.CALL if bare else _State.TEXT
            if self._state is _State.TEXT:
                at = self._held.find(self._tag.open) if self._tag else -1
                if at < 0:
                    yield self._cut(self._surely_text())
                    return
                yield self._cut(len(self._held[:at].rstrip()))
                self._state = _State.CALL
            if (end := self._end_of_block()) is None:
                return
            block, self._held = self._held[:end], self._held[end:]
            self._state = _State.TEXT
            yield self._calls_or_text(block, closed=True)

    def _cut(self, at: int) -> Read:
        text, self._held = self._held[:at], self._held[at:]
        return Read(text)

    def _surely_text(self) -> int:
        """Where in the held text something may begin that is not: a tag, and white space before it."""
        if self._tag is None:
            return len(self._held)
        prefix = next(n for n in range(len(self._tag.open) - 1, -1, -1) if self._held.endswith(self._tag.open[:n]))
        return len(self._held[: len(self._held) - prefix].rstrip())

    def _end_of_block(self) -> int | None:
        """The end of the first closing tag outside of the strings of its JSON."""
        if self._tag is None or self._end is None or self._tag.close not in self._held:
            return None
        begin = self._held.index(self._tag.open) + len(self._tag.open)
        ends = (match.end() for match in self._end.finditer(self._held, begin) if match[0] == self._tag.close)
        return next(ends, None)

    def _calls_or_text(self, block: str, *, closed: bool) -> Read:
        inside = block
        if self._tag is not None:
            inside = block.lstrip().removeprefix(self._tag.open)
            inside = inside.removesuffix(self._tag.close) if closed else inside
        calls = _calls(inside, self._names)
        if calls is None or (self._tag is None and not calls):  # "[]" may be an answer, in a tag it is none
            return Read(block)
        left = len(calls) if self._most is None else max(0, self._most - self._told)
        self._told += len(calls[:left])
        return Read(calls=calls[:left])

    @staticmethod
    def _joined(reads: Iterator[Read]) -> Read:
        every = list(reads)
        return Read("".join(read.text for read in every), tuple(call for read in every for call in read.calls))


def _calls(text: str, names: frozenset[str]) -> tuple[Call, ...] | None:
    """The calls that `text` is made of, an empty list of them included; None when it is anything else."""
    try:
        values = list(_values(text))
    except (ValueError, RecursionError):
        return None
    every = [one for value in values for one in (value if isinstance(value, list) else [value])]
    calls = [_call(one, names) for one in every]
    whole = tuple(call for call in calls if call is not None)
    return whole if values and len(whole) == len(calls) else None


def _values(text: str) -> Iterator[Any]:
    decoder, at = json.JSONDecoder(parse_constant=_no_number), 0
    while (begin := _end_of(_SEPARATOR, text, at)) < len(text):
        value, at = decoder.raw_decode(text, begin)
        yield value


def _call(value: Any, names: frozenset[str]) -> Call | None:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or value["name"] not in names:
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if not isinstance(arguments, dict):
        return None
    try:
        return Call(value["name"], printable(json.dumps(arguments, ensure_ascii=False, allow_nan=False)))
    except (ValueError, RecursionError):  # 1e999
        return None


def _end_of(pattern: re.Pattern[str], text: str, at: int) -> int:
    match = pattern.match(text, at)
    return match.end() if match else at


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
