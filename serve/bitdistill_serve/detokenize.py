"""Tokens to text while they arrive: whole characters only, and stop strings found across token boundaries.

A tokenizer decodes a sequence, not a token: a character may span tokens (byte-level BPE, byte fallback), and the first
token of a sequence may lose its leading space.  So `Detokenizer` decodes a short window twice, with and without its new
tokens, and the difference is the new text.  The text is held back while its end may still change:

* it ends in U+FFFD: the bytes so far are perhaps the first half of a character;
* the last token is a byte-fallback byte (`<0xE4>`): a run of those is decoded as a whole, or not at all.

What was emitted, joined, equals decoding everything at once, for any tokens.  `tests/serve` holds it to that.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"
CONTEXT_TOKENS = 6  # of the prompt: enough for a decoder that looks one token back, and cheap
LONG_WINDOW = 16  # a window this long holds invalid bytes, not half a character: look for a cut inside it
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class Tokenizer(Protocol):
    """What is needed of a Hugging Face tokenizer."""

    @property
    def all_special_ids(self) -> list[int]: ...

    def decode(
        self, token_ids: list[int], *, skip_special_tokens: bool = ..., clean_up_tokenization_spaces: bool = ...
    ) -> str: ...

    def convert_ids_to_tokens(self, ids: int) -> str | None: ...


class Detokenizer:
    """The text of one growing sequence.  Special tokens have no text.

    `context_ids` is the prompt: its end decides whether the first new token keeps its leading space.
    """

    def __init__(self, tokenizer: Tokenizer, context_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.all_special_ids)
        self._window = [i for i in context_ids[-CONTEXT_TOKENS:] if i not in self._special]
        if self._is_open(self._decode(self._window)):
            self._window = []  # a prompt cut inside a character is no context
        self._done = len(self._window)  # tokens of the window whose text is out

    def push(self, token: int) -> str:
        """Take one token; return the text that became certain, often one piece and sometimes none."""
        if token in self._special:
            return ""
        self._window.append(token)
        text = self._decode(self._window)
        if self._is_open(text):
            return self._cut() if len(self._window) - self._done > LONG_WINDOW else ""
        return self._emit(text, len(self._window))

    def finish(self) -> str:
        """The text still held back, with U+FFFD for what never became a character."""
        return self._emit(self._decode(self._window), len(self._window))

    def _emit(self, text: str, tokens: int) -> str:
        """Return what the first `tokens` of the window (whose text is `text`) add, and move the window on."""
        new = text[len(self._decode(self._window[: self._done])) :]
        if new:  # tokens without text stay: they may be what tells the next one that it is not the first
            self._window, self._done = self._window[self._done :], tokens - self._done
        return new

    def _cut(self) -> str:
        """Emit up to the last place where decoding the two sides apart changes nothing, so no later byte can."""
        if _BYTE_TOKEN.fullmatch(self._tokenizer.convert_ids_to_tokens(self._window[-1]) or ""):
            return ""
        text = self._decode(self._window)
        for cut in range(len(self._window) - 1, self._done, -1):
            right = self._decode(self._window[cut:])
            left = self._decode(self._window[:cut])
            if right and left + right == text:
                return self._emit(left, cut)
        return ""

    def _is_open(self, text: str) -> bool:
        """True while later tokens may change the end of `text`, the window's text."""
        if text.endswith(REPLACEMENT):
            return True
        last = self._tokenizer.convert_ids_to_tokens(self._window[-1]) if self._window else None
        return last is not None and _BYTE_TOKEN.fullmatch(last) is not None

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class StopMatcher:
    """Cuts a text before the first stop string, however the text is chopped.

    The match that *ends* first wins (of those, the one that starts first): it is the one that a reader of single
    characters meets, so the result does not depend on where tokens end.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(s for s in stops if s)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Take more text; return what is surely not part of a stop string.  Sets `stopped` at a match."""
        if self.stopped or not self._stops:
            return "" if self.stopped else text
        text, self._held = self._held + text, ""
        matches = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if matches:
            self.stopped = True
            return text[: min(matches)[1]]
        held = max((n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """The text that was held back as the possible start of a stop string."""
        held, self._held = self._held, ""
        return held
