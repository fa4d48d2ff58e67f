"""One generation: what is asked for, its state between its arrival and its end, what it grew by, and that as text.

The decoding thread knows tokens only (`Job`, `Growth`).  They become text where they are read (`Text`): a step streams
all weights through the caches, so that every line of Python after it costs several times its usual time, and while
Python makes text the next step is already running.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Generic, TypeVar

from bitdistill_ray.decode.logprobs import TokenLogprob
from bitdistill_ray.decode.sampling import History, Sampling
from bitdistill_ray.errors import BitdistillError
from bitdistill_serve.detokenize import Detokenizer, StopMatcher, Tokenizer
from bitdistill_serve.grammar import Grammar

K = TypeVar("K", bound=Hashable)


class End(Enum):
    """Why a sequence ended."""

    STOP = "stop"  # a stop token, a stop string, or the end of its grammar
    LENGTH = "length"  # max_tokens, or the slot is full
    CANCELLED = "cancelled"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What is asked for: continue `prompt`, up to any of `stops`."""

    prompt: tuple[int, ...]
    sampling: Sampling
    stops: tuple[str, ...] = ()
    logprobs: int | None = None
    """Tell each token's log-probability, beside that many alternatives."""
    score_from: int | None = None
    """Tell those of the prompt's tokens too, from this one on; at least 1, for nothing comes before token 0."""
    ignore_eos: bool = False
    """Go on after a stop token, up to the limit."""
    writes: bool = True
    """False: the prompt is only scored."""
    common: int = 0
    """First tokens of the prompt that other generations of the same request have too."""
    grammar: Grammar | None = None

    @property
    def reusable(self) -> int:
        """How many first tokens may come from the cache: what is scored must be read."""
        return len(self.prompt) - 1 if self.score_from is None else self.score_from - 1


@dataclass(slots=True, kw_only=True)
class Told:
    """What the decoder tells of one sequence; its end, and the error of a failure, in the last.

    `tokens` counts what was generated, `cached` the tokens of the prompt that had not to be read.  `logprobs` are of
    generated tokens, `scored` of the prompt's.
    """

    tokens: int = 0
    end: End | None = None
    error: BitdistillError | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    scored: tuple[TokenLogprob, ...] = ()
    cached: int = 0


@dataclass(slots=True)
class Piece(Told):
    """What one sequence grew by."""

    text: str = ""

    @classmethod
    def joined(cls, pieces: Iterable[Piece]) -> Piece:
        """Pieces that follow each other as one."""
        first, *others = pieces
        if not others:
            return first
        every = [first, *others]
        return cls(
            "".join(p.text for p in every),
            tokens=sum(p.tokens for p in every),
            end=every[-1].end,
            error=every[-1].error,
            logprobs=tuple(told for p in every for told in p.logprobs),
            scored=tuple(told for p in every for told in p.scored),
            cached=sum(p.cached for p in every),
        )


@dataclass(slots=True)
class Growth(Told):
    """A `Piece` before it is text: `token` is None where there is none, or where the one that ended it has no text."""

    token: int | None = None
    first: bool = False

    @property
    def urgent(self) -> bool:
        """What nobody should wait for: a beginning or an end."""
        return self.first or self.end is not None


class Text:
    """The text of one generation, and its end at a stop string."""

    __slots__ = ("_detokenizer", "_stops")

    def __init__(self, generation: Generation, tokenizer: Tokenizer) -> None:
        self._detokenizer = Detokenizer(tokenizer, generation.prompt)
        self._stops = StopMatcher(generation.stops)

    def piece(self, growth: Growth) -> Piece:
        """What was told of the generation next, as text; nothing after a stop string."""
        if self._stopped():
            return Piece()
        text = "" if growth.token is None else self._stops.push(self._detokenizer.push(growth.token))
        if growth.end in (End.STOP, End.LENGTH) and not self._stopped():
            text += self._stops.push(self._detokenizer.finish()) + self._stops.finish()
        end = End.STOP if self._stopped() else growth.end
        return Piece(text, tokens=growth.tokens, end=end, error=growth.error, logprobs=growth.logprobs,
                     scored=growth.scored, cached=growth.cached)  # fmt: skip

    def _stopped(self) -> bool:
        return self._stops.stopped


class Job(Generic[K]):
    """A generation between `Batch.add` and its end.  `slot` is -1 while it waits."""

    __slots__ = ("arrived_s", "cached", "client", "generation", "guide", "key", "plain", "slot", "tokens")

    def __init__(self, key: K, generation: Generation, *, client: str, arrived_s: float) -> None:
        self.key, self.generation, self.client, self.arrived_s = key, generation, client, arrived_s
        self.guide = generation.grammar.guide() if generation.grammar else None
        self.plain = self.guide is None and generation.sampling.plain  # the likeliest token is the next
        self.slot = -1
        self.tokens: list[int] = []
        self.cached = 0  # not told yet

    def history(self) -> History:
        """What its next token depends on."""
        allowed_V = self.guide.allowed() if self.guide else None
        return History(self.generation.sampling, self.generation.prompt, self.tokens, allowed_V)

    def grow(self, token: int, told: tuple[TokenLogprob, ...], *, stop_ids: frozenset[int], full: bool) -> Growth:
        """Append a token; it has an end if this is the last.  `full`: its slot holds no further one."""
        self.tokens.append(token)
        complete = self.guide.take(token) if self.guide else False
        end = End.LENGTH if full or len(self.tokens) >= self.generation.sampling.max_tokens else None
        end = End.STOP if complete else end
        if token in stop_ids and not self.generation.ignore_eos:
            return Growth(tokens=1, end=End.STOP, logprobs=told, cached=self.tell_cached())
        first = len(self.tokens) == 1
        return Growth(token, first, tokens=1, end=end, logprobs=told, cached=self.tell_cached())

    def tell_cached(self) -> int:
        """The tokens that had not to be read, once."""
        cached, self.cached = self.cached, 0
        return cached
