"""From a stream of pieces to OpenAI's answers: whole, or as server-sent events.

The endpoints differ in the shape of a choice only; `CompletionAnswer` and `ChatAnswer` are that difference.  A whole
answer is its pieces put together, so both forms are made by the same code.
"""

from __future__ import annotations

import secrets
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
    TOOL_CALLS,
    CalledFunction,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatFinish,
    ChatMessage,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    PromptDetails,
    ToolCall,
    ToolCallDelta,
    Usage,
)
from bitdistill_serve.requests import StreamOptions
from bitdistill_serve.token_texts import TokenTexts
from bitdistill_serve.tool_calls import CallReader, Read

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


@dataclass(slots=True, kw_only=True)
class ChatAnswer(Answer):
    """`/v1/chat/completions`: the first chunk of a choice has its role, the last its finish reason and no content.

    Where there are tools, `reader` makes what reads the calls in a choice, and `called` counts them.
    """

    reader: Callable[[], CallReader] | None = None
    called: Callable[[], object] = lambda: None
    readers: dict[int, CallReader] = field(default_factory=dict)
    indices: dict[int, int] = field(default_factory=dict)  # the calls of each choice so far

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> ChatCompletion:
        choices = []
        for i, piece in enumerate(pieces):
            text, calls = self._read(i, piece)
            made = [ToolCall(id=call.id, function=call.function) for call in calls]
            message = ChatMessage(content=text if text or not made else None, tool_calls=made or None)
            told = chat_logprobs(self.texts, piece.logprobs) if self._tells(i) else None
            reason = self._finish(i, piece) or FinishReason.STOP
            choices.append(ChatChoice(index=i, message=message, logprobs=told, finish_reason=reason))
        return ChatCompletion(id=self.id, model=self.model, created=self.created, choices=choices, usage=usage)

    def chunks(self, index: int, piece: Piece, *, first: bool) -> list[ChatCompletionChunk]:
        choices = []
        told = chat_logprobs(self.texts, piece.logprobs) if self._tells(index) else None
        text, calls = self._read(index, piece)
        if first:
            delta = ChatDelta(role="assistant", content=text)
            choices.append(ChatChunkChoice(index=index, delta=delta, logprobs=told))
        elif text or piece.logprobs:
            choices.append(ChatChunkChoice(index=index, delta=ChatDelta(content=text), logprobs=told))
        if calls:
            choices.append(ChatChunkChoice(index=index, delta=ChatDelta(tool_calls=calls)))
        if (reason := self._finish(index, piece)) is not None:
            choices.append(ChatChunkChoice(index=index, delta=ChatDelta(), finish_reason=reason))
        return [
            ChatCompletionChunk(id=self.id, model=self.model, created=self.created, choices=[choice])
            for choice in choices
        ]

    def last_chunk(self, usage: Usage) -> ChatCompletionChunk:
        return ChatCompletionChunk(id=self.id, model=self.model, created=self.created, choices=[], usage=usage)

    def _tells(self, index: int) -> bool:
        return self.generations[index].logprobs is not None

    def _read(self, index: int, piece: Piece) -> tuple[str, list[ToolCallDelta]]:
        """The text and the calls that one choice grew by."""
        if self.reader is None:
            return piece.text, []
        if (reader := self.readers.get(index)) is None:
            reader = self.readers[index] = self.reader()
        read, rest = reader.push(piece.text), reader.finish() if piece.end is not None else Read()
        calls = []
        for call in (*read.calls, *rest.calls):
            self.called()
            at = self.indices[index] = self.indices.get(index, -1) + 1
            function = CalledFunction(name=call.name, arguments=call.arguments)
            calls.append(ToolCallDelta(index=at, id=f"call_{secrets.token_hex(12)}", function=function))
        return read.text + rest.text, calls

    def _finish(self, index: int, piece: Piece) -> ChatFinish | None:
        reason = _reason(piece)
        return TOOL_CALLS if reason is FinishReason.STOP and index in self.indices else reason


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


async def events(stream: Stream, answer: Answer, charge: Charge, options: StreamOptions) -> AsyncIterator[str]:
    """Server-sent events, `[DONE]` last.  An error becomes an event, for the status has been sent by then."""
    left_out = None if options.include_usage else {"usage"}
    begun: set[int] = set()
    count = Count()
    try:
        async for index, piece in stream:
            count.add(piece)
            if piece.text or piece.logprobs or piece.scored or _reason(piece) is not None:
                for chunk in answer.chunks(index, piece, first=index not in begun):
                    if options.include_usage and options.continuous_usage_stats:
                        chunk.usage = answer.usage(count)
                    yield f"data: {chunk.model_dump_json(exclude=left_out)}\n\n"
                begun.add(index)
        if options.include_usage:
            yield f"data: {answer.last_chunk(answer.usage(count)).model_dump_json()}\n\n"
    except BitdistillError as error:
        yield f"data: {api_error(error).body.model_dump_json()}\n\n"
    finally:
        charge(count.generated)
    yield DONE


def _reason(piece: Piece) -> FinishReason | None:
    return REASONS.get(piece.end) if piece.end is not None else None
