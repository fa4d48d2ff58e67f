"""How a model's chat template writes calls of functions: found out by letting it write some.

The template is given a chat in which the assistant has called functions of known names; what it writes around these
names and their arguments is the form that the model was trained on, spaces included.  It is what `CallReader` reads and
what a grammar makes a model write that is told to call (`tool_choice`): the frame to the letter, one of the allowed
names, and arguments of that function's JSON schema.  A model that may call writes any text, and where one of the
functions is `strict`, its calls are of the same grammar.

A template that only tells its model of `<tool_call>`, and writes no earlier calls itself, has the form that goes by
that tag (Qwen's, of Hermes).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from jinja2.exceptions import TemplateError

from bitdistill_serve.messages import Function
from bitdistill_serve.tool_calls import CallReader, Tag

MOST_CALLS = 16  # of one answer that must call
NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}
Turns = list[dict[str, Any]]
Template = Callable[[Turns], str]

_NAMES = ("first_probe", "second_probe")
_ARGUMENTS = re.compile(r'\{"a"(?P<colon>\s*:\s*)1(?P<comma>\s*,\s*)"b"\s*:\s*2\}')
_OPENING = re.compile(r'(?P<tag><(?![/|])[^<>]*[^<>|]>)?\s*\[?\s*\{[^{}<>]*"\Z')
_CLOSING = re.compile(r"\s*\}\s*\]?\s*(?:</[^<>|]+>)?")


@dataclass(frozen=True, slots=True)
class ToolForm:
    """`opening` NAME `middle` ARGUMENTS `closing`, and `between` two calls; None: an answer has one."""

    opening: str
    middle: str
    between: str | None
    closing: str
    tag: Tag | None
    colon: str = ": "
    comma: str = ", "

    @classmethod
    def of(cls, template: Template) -> ToolForm | None:
        """The form of a template; None when it writes calls in another way than as JSON, or not at all."""
        with suppress(TemplateError, TypeError, ValueError):  # it may refuse the probe
            if (form := cls._around(template(_turns(1)))) is not None:
                with suppress(TemplateError, TypeError, ValueError):
                    return form._with_second(template(_turns(2)))
                return form
        return None

    def reader(self, functions: Sequence[Function], *, most: int | None) -> CallReader:
        """A reader of one answer, in which these may be called, `most` times."""
        return CallReader(frozenset(of.name for of in functions), self.tag, most=most)

    def must(self, functions: Sequence[Function], *, several: bool) -> str:
        """A grammar: call one of these, `several` of them where the form has a place for that."""
        more = self._more() if several else ""
        start = f"start: {_quoted(self.opening)} call {more} {_quoted(self.closing)}"
        return "\n".join([start, *self._calls(functions, {of.name for of in functions})])

    def may(self, functions: Sequence[Function], *, several: bool) -> str:
        """A grammar: any text, and calls of these in it; what is not `strict` takes any arguments."""
        if self.tag is None:
            start = [
                f"start: SPACE? ({_quoted(self.opening)} call {_quoted(self.closing)} | TEXT)?",
                r"SPACE: /[ \t\n\r]+/",
                r"TEXT: /([^ \t\n\r{\[]|\[[ \t\n\r]*[^ \t\n\r{])(.|\n)*|\[/",
            ]
        else:
            tag = "".join(f"\\{c}" if not c.isalnum() and c not in "<>_" else c for c in self.tag.open)
            more = self._more() if several and self.between and self.tag.open not in self.between else ""
            block = f"{_quoted(self.opening.removeprefix(self.tag.open))} call {more} {_quoted(self.closing)}"
            start = [
                "start: (into block)* TEXT?" if several else "start: into block | TEXT?",
                f"into[lazy]: /(.|\\n)*{tag}/",
                f"TEXT: /(.|\\n)+/ & ~/(.|\\n)*{tag}(.|\\n)*/",
                f"block: {block}",
            ]
        return "\n".join([*start, *self._calls(functions, {of.name for of in functions if of.strict})])

    def _more(self) -> str:
        return "" if self.between is None else f"({_quoted(self.between)} call){{0,{MOST_CALLS - 1}}}"

    def _calls(self, functions: Sequence[Function], strict: set[str]) -> Iterator[str]:
        style = {"whitespace_flexible": False, "item_separator": self.comma, "key_separator": self.colon}
        yield f"call: {' | '.join(f'call_{i}' for i in range(len(functions)))}"
        for i, function in enumerate(functions):
            schema = {"type": "object"} | function.parameters if function.parameters else NO_PARAMETERS
            schema = (schema if function.name in strict else {"type": "object"}) | {"x-guidance": style}
            yield f"call_{i}: {_quoted(function.name + self.middle)} arguments_{i}"
            yield f"arguments_{i}: %json {json.dumps(schema)}"

    @classmethod
    def _around(cls, written: str) -> ToolForm | None:
        """The form of an answer with one call, which the reader must be able to read."""
        before, named, after = written.partition(_NAMES[0])
        arguments, opening = _ARGUMENTS.search(after), _OPENING.search(before)
        if not named or arguments is None or opening is None:
            return None
        closing = _CLOSING.match(after, arguments.end())
        if closing is None:
            return None
        tag = Tag(opening["tag"], f"</{opening['tag'][1:]}") if opening["tag"] else None
        form = cls(
            opening[0].lstrip(), after[: arguments.start()], None, closing[0], tag, arguments["colon"],
            arguments["comma"],
        )  # fmt: skip
        reader = form.reader([Function(name=_NAMES[0])], most=None)
        text = reader.push(form.opening + _NAMES[0] + form.middle + arguments[0] + form.closing).text
        return form if not text + reader.finish().text and reader.called else None

    def _with_second(self, written: str) -> ToolForm:
        """This form, with what stands between two calls where the template writes two."""
        _, _, after = written.partition(_NAMES[0])
        between, named, _ = after.partition(_NAMES[1])
        arguments = _ARGUMENTS.search(between)
        if not named or arguments is None:
            return self
        return ToolForm(self.opening, self.middle, between[arguments.end() :], self.closing, self.tag, self.colon,
                        self.comma)  # fmt: skip


HERMES = ToolForm(
    opening='<tool_call>\n{"name": "',
    middle='", "arguments": ',
    between='}\n</tool_call>\n<tool_call>\n{"name": "',
    closing="}\n</tool_call>",
    tag=Tag("<tool_call>", "</tool_call>"),
)


def _turns(calls: int) -> Turns:
    """A question, and an answer of so many calls."""
    made = [
        {"id": f"call{i}0000", "type": "function", "function": {"name": name, "arguments": {"a": 1, "b": 2}}}
        for i, name in enumerate(_NAMES[:calls])
    ]
    return [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": made}]


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
