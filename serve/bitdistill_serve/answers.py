"""From a stream of pieces to OpenAI's answers: whole, or as server-sent events.

The endpoints differ in the shape of a choice only; `CompletionAnswer` and `ChatAnswer` are that difference.  A whole
answer is its pieces put together, so both forms are made by the same code.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from bitdistill_ray.decode.generation import FinishReason
from bitdistill_ray.errors import BitdistillError
from bitdistill_serve.engine import Stream
from bitdistill_serve.errors import api_error
from bitdistill_serve.generation import End, Generation, Piece
from bitdistill_serve.logprob_lists import CompletionLogprobList, chat_logprobs, joined
from bitdistill_serve.replies import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatMessage,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    PromptDetails,
    Usage,
)
from bitdistill_serve.token_texts import TokenTexts

DONE = "data: [DONE]\n\n"
REASONS = {End.STOP: FinishReason.STOP, End.LENGTH: FinishReason.LENGTH}


@dataclass(slots=True)
class Count:
    """Tokens of a request so far."""

    generated: int = 0
    cached: int = 0

    def add(self, piece: Piece) -> None:
        """One piece more."""
        self.generated += piece.tokens
        self.cached += piece.cached


@dataclass(slots=True, kw_only=True)
class Answer(ABC):
    """The envelope that all chunks of one answer share."""

    id: str
    model: str
    generations: Sequence[Generation]
    choices: int  # `n`: those of one prompt are neighbours
    texts: TokenTexts
    created: int = field(default_factory=lambda: int(time.time()))

    def usage(self, count: Count) -> Usage:
        """The token counts.  A prompt counts once, however many choices it has."""
        prompt = sum(len(g.prompt) for g in self.generations) // self.choices
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=count.generated,
            total_tokens=prompt + count.generated,
            prompt_tokens_details=PromptDetails(cached_tokens=min(prompt, count.cached)),
        )

    @abstractmethod
    def whole(self, pieces: Sequence[Piece], usage: Usage) -> Completion | ChatCompletion:
        """All choices, each its pieces in one."""

    @abstractmethod
    def chunks(self, index: int, piece: Piece, *, first: bool) -> list[Completion] | list[ChatCompletionChunk]:
        """What one choice grew by; `first` tells that it is this choice's first piece."""

    @abstractmethod
    def last_chunk(self, usage: Usage) -> Completion | ChatCompletionChunk:
        """The chunk that has no choice, only the token counts."""


@dataclass(slots=True, kw_only=True)
class CompletionAnswer(Answer):
    """`/v1/completions`; `echo` has the text of each prompt, where it is to be repeated."""

    echo: Sequence[str] | None = None
    lists: dict[int, CompletionLogprobList] = field(default_factory=dict)

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> Completion:
        choices = [self._choice(i, piece, first=True) for i, piece in enumerate(pieces)]
        return Completion(id=self.id, model=self.model, created=self.created, choices=choices, usage=usage)

    def chunks(self, index: int, piece: Piece, *, first: bool) -> list[Completion]:
        choice = self._choice(index, piece, first=first)
        return [Completion(id=self.id, model=self.model, created=self.created, choices=[choice])]

    def last_chunk(self, usage: Usage) -> Completion:
        return Completion(id=self.id, model=self.model, created=self.created, choices=[], usage=usage)

    def _choice(self, index: int, piece: Piece, *, first: bool) -> CompletionChoice:
        text = piece.text
        if first and self.echo is not None:
            text = self.echo[index // self.choices] + text
        return CompletionChoice(
            index=index, text=text, logprobs=self._logprobs(index, piece, first=first), finish_reason=_reason(piece)
        )

    def _logprobs(self, index: int, piece: Piece, *, first: bool) -> CompletionLogprobs | None:
        asked = self.generations[index]
        if asked.logprobs is None:
            return None
        told = self.lists.setdefault(index, CompletionLogprobList(self.texts))
        lists = [told.unscored(asked.prompt[0])] if first and asked.score_from is not None else []
        return joined([*lists, told.more(piece.scored), told.more(piece.logprobs)])


class ChatAnswer(Answer):
    """`/v1/chat/completions`: the first chunk of a choice has its role, the last its finish reason and no content."""

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> ChatCompletion:
        choices = [
            ChatChoice(
                index=i,
                message=ChatMessage(content=piece.text),
                logprobs=chat_logprobs(self.texts, piece.logprobs) if self._tells(i) else None,
                finish_reason=_reason(piece) or FinishReason.STOP,
            )
            for i, piece in enumerate(pieces)
        ]
        return ChatCompletion(id=self.id, model=self.model, created=self.created, choices=choices, usage=usage)

    def chunks(self, index: int, piece: Piece, *, first: bool) -> list[ChatCompletionChunk]:
        choices = []
        told = chat_logprobs(self.texts, piece.logprobs) if self._tells(index) else None
        if first:
            delta = ChatDelta(role="assistant", content=piece.text)
            choices.append(ChatChunkChoice(index=index, delta=delta, logprobs=told))
        elif piece.text or piece.logprobs:
            choices.append(ChatChunkChoice(index=index, delta=ChatDelta(content=piece.text), logprobs=told))
        if (reason := _reason(piece)) is not None:
            choices.append(ChatChunkChoice(index=index, delta=ChatDelta(), finish_reason=reason))
        return [
            ChatCompletionChunk(id=self.id, model=self.model, created=self.created, choices=[choice])
            for choice in choices
        ]

    def last_chunk(self, usage: Usage) -> ChatCompletionChunk:
        return ChatCompletionChunk(id=self.id, model=self.model, created=self.created, choices=[], usage=usage)

    def _tells(self, index: int) -> bool:
        return self.generations[index].logprobs is not None


Charge = Callable[[int], None]
"""Told, when a request ends in whatever way, how many tokens it generated."""


async def collected(stream: Stream, charge: Charge) -> tuple[list[Piece], Count]:
    """Wait for every generation.  Raises ApiError when one fails; its siblings are cancelled then, as at a hang-up."""
    pieces: list[list[Piece]] = [[] for _ in stream.generations]
    count = Count()
    try:
        async for index, piece in stream:
            pieces[index].append(piece)
            count.add(piece)
    except BitdistillError as error:
        raise api_error(error) from error
    finally:
        stream.cancel()
        charge(count.generated)
    return [Piece.joined(of) for of in pieces], count


async def whole(stream: Stream, answer: Answer, charge: Charge) -> Completion | ChatCompletion:
    """The answer when every choice has ended.  Raises ApiError."""
    pieces, count = await collected(stream, charge)
    return answer.whole(pieces, answer.usage(count))


async def events(stream: Stream, answer: Answer, charge: Charge, *, include_usage: bool) -> AsyncIterator[str]:
    """Server-sent events, `[DONE]` last.  An error becomes an event, for the status has been sent by then."""
    left_out = None if include_usage else {"usage"}
    begun: set[int] = set()
    count = Count()
    try:
        async for index, piece in stream:
            count.add(piece)
            if piece.text or piece.logprobs or piece.scored or _reason(piece) is not None:
                for chunk in answer.chunks(index, piece, first=index not in begun):
                    yield f"data: {chunk.model_dump_json(exclude=left_out)}\n\n"
                begun.add(index)
        if include_usage:
            yield f"data: {answer.last_chunk(answer.usage(count)).model_dump_json()}\n\n"
    except BitdistillError as error:
        yield f"data: {api_error(error).body.model_dump_json()}\n\n"
    finally:
        charge(count.generated)
    yield DONE


def _reason(piece: Piece) -> FinishReason | None:
    return REASONS.get(piece.end) if piece.end is not None else None
