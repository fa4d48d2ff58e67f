"""Constrained output: one of several texts, a regular expression, or JSON of a schema, through llguidance.

A `Grammar` is compiled once, where the prompt is prepared; each generation steps through a copy of its own, a `Guide`,
which says before every token which ones may come.  JSON is written without spaces between its parts: small models that
may write spaces for ever do.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import llguidance
import llguidance.hf
import llguidance.numpy
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bitdistill_serve.errors import ApiError, GrammarError
from bitdistill_serve.requests import GenerationRequest, JsonObject, JsonSchemaFormat

MOST_BYTES = 1 << 16  # of a schema, an expression or a list of choices
METACHARACTERS = frozenset(r"\.+*?()|[]{}^$#&-~/")
COMPACT = {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"}


class Guide:
    """One generation's way through a grammar."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size
        self._bits = llguidance.numpy.allocate_token_bitmask(1, vocab_size)

    def allowed(self) -> Tensor:
        """True for each token of the vocabulary that may come next.  Raises GrammarError."""
        self._check()
        llguidance.numpy.fill_next_token_bitmask(self._matcher, self._bits)
        self._check()
        bits_V = np.unpackbits(self._bits.view(np.uint8)[0], count=self._vocab_size, bitorder="little")
        return torch.from_numpy(bits_V).bool()

    def take(self, token: int) -> bool:
        """Step over a token that was allowed; True when nothing may follow it."""
        self._matcher.consume_token(token)
        self._check()
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarError("the constraint", _first_line(self._matcher.get_error()), "Give a simpler one")


@dataclass(frozen=True, slots=True, eq=False)
class Grammar:
    """A compiled constraint, shared by the choices of a request."""

    matcher: Any
    vocab_size: int

    def guide(self) -> Guide:
        """A way through it, from its beginning."""
        return Guide(self.matcher.deep_copy(), self.vocab_size)


class Grammars:
    """Compiles the constraints of requests for one tokenizer; used by one thread."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, vocab_size: int, stop_ids: Iterable[int]) -> None:
        self._tokenizer, self._vocab_size, self._stop_ids = tokenizer, vocab_size, sorted(stop_ids)

    def compile(self, request: GenerationRequest) -> Grammar | None:
        """The grammar that a request asks for, or None.  Raises ApiError for one that does not compile."""
        source = _source(request)
        return None if source is None else self._compiled(*source)

    def of_calls(self, lark: str) -> Grammar:
        """The grammar of an answer that must call a function.  Raises ApiError for one that does not compile."""
        return self._compiled("tools", "lark", lark)

    def _compiled(self, param: str, kind: str, text: str) -> Grammar:
        if len(text) > MOST_BYTES:
            raise ApiError(400, f"{param}: is longer than {MOST_BYTES} characters", param=param)
        try:
            if kind == "json":
                grammar = llguidance.LLMatcher.grammar_from_json_schema(text, defaults=COMPACT)
            elif kind == "lark":
                grammar = llguidance.LLMatcher.grammar_from_lark(text)
            else:
                grammar = llguidance.LLMatcher.grammar_from_regex(text)
            matcher = llguidance.LLMatcher(self._llguidance, grammar, log_level=0)
        except (ValueError, RuntimeError) as error:
            raise ApiError(400, f"{param}: {_first_line(str(error))}", param=param) from None
        if matcher.is_error():
            raise ApiError(400, f"{param}: {_first_line(matcher.get_error())}", param=param)
        return Grammar(matcher, self._vocab_size)

    @cached_property
    def _llguidance(self) -> Any:  # takes a second for a large vocabulary, so not before it is asked for
        return llguidance.hf.from_tokenizer(self._tokenizer, n_vocab=self._vocab_size, eos_token=self._stop_ids)


def _source(request: GenerationRequest) -> tuple[str, str, str] | None:
    """(parameter, kind, text) of a request's constraint."""
    format = request.response_format
    if isinstance(format, JsonSchemaFormat):
        return "response_format", "json", json.dumps(format.json_schema.schema_)
    if isinstance(format, JsonObject):
        return "response_format", "json", '{"type": "object"}'
    if request.guided_json is not None:
        return "guided_json", "json", json.dumps(request.guided_json)
    if request.guided_choice is not None:
        return "guided_choice", "regex", "|".join(map(_literally, request.guided_choice))
    return None if request.guided_regex is None else ("guided_regex", "regex", request.guided_regex)


def _literally(text: str) -> str:
    """A regular expression for `text` itself."""
    return "".join(f"\\{c}" if c in METACHARACTERS else c for c in text)


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]
