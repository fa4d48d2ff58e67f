"""From a stream of pieces to OpenAI's answers: whole, or as server-sent events.

The endpoints differ in the shape of a choice only; `CompletionAnswer` and `ChatAnswer` are that difference.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from bitdistill_ray.decode.base import CapacityError
from bitdistill_ray.decode.generation import FinishReason
from bitdistill_ray.errors import BitdistillError, ModelError
from bitdistill_serve.batch import End, Piece
from bitdistill_serve.engine import EngineStoppedError, QueueFullError, Stream
from bitdistill_serve.protocol import (
    ApiError,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatMessage,
    Completion,
    CompletionChoice,
    ErrorType,
    Usage,
)

DONE = "data: [DONE]\n\n"
REASONS = {End.STOP: FinishReason.STOP, End.LENGTH: FinishReason.LENGTH}


@dataclass(slots=True)
class Text:
    """One choice as it grows; it has ended when `reason` is set."""

    text: str = ""
    reason: FinishReason | None = None


@dataclass(slots=True, kw_only=True)
class Answer(ABC):
    """The envelope that all chunks of one answer share."""

    id: str
    model: str
    prompt_tokens: int  # of all prompts; each counts once, however many choices it has
    created: int = field(default_factory=lambda: int(time.time()))

    def usage(self, tokens: int) -> Usage:
        """The token counts when `tokens` were generated."""
        return Usage(
            prompt_tokens=self.prompt_tokens, completion_tokens=tokens, total_tokens=self.prompt_tokens + tokens
        )

    @abstractmethod
    def whole(self, texts: Sequence[Text], usage: Usage) -> Completion | ChatCompletion:
        """All choices, ended."""

    @abstractmethod
    def chunks(self, index: int, piece: Text, *, first: bool) -> list[Completion] | list[ChatCompletionChunk]:
        """What one choice grew by; `first` tells that it is this choice's first piece."""

    @abstractmethod
    def last_chunk(self, usage: Usage) -> Completion | ChatCompletionChunk:
        """The chunk that has no choice, only the token counts."""


class CompletionAnswer(Answer):
    """`/v1/completions`."""

    def whole(self, texts: Sequence[Text], usage: Usage) -> Completion:
        choices = [CompletionChoice(index=i, text=t.text, finish_reason=t.reason) for i, t in enumerate(texts)]
        return Completion(id=self.id, model=self.model, created=self.created, choices=choices, usage=usage)

    def chunks(self, index: int, piece: Text, *, first: bool) -> list[Completion]:
        choice = CompletionChoice(index=index, text=piece.text, finish_reason=piece.reason)
        return [Completion(id=self.id, model=self.model, created=self.created, choices=[choice])]

    def last_chunk(self, usage: Usage) -> Completion:
        return Completion(id=self.id, model=self.model, created=self.created, choices=[], usage=usage)


class ChatAnswer(Answer):
    """`/v1/chat/completions`: the first chunk of a choice has its role, the last its finish reason and no content."""

    def whole(self, texts: Sequence[Text], usage: Usage) -> ChatCompletion:
        choices = [
            ChatChoice(index=i, message=ChatMessage(content=t.text), finish_reason=t.reason or FinishReason.STOP)
            for i, t in enumerate(texts)
        ]
        return ChatCompletion(id=self.id, model=self.model, created=self.created, choices=choices, usage=usage)

    def chunks(self, index: int, piece: Text, *, first: bool) -> list[ChatCompletionChunk]:
        choices = []
        if first:
            delta = ChatDelta(role="assistant", content=piece.text)
            choices.append(ChatChunkChoice(index=index, delta=delta))
        elif piece.text:
            choices.append(ChatChunkChoice(index=index, delta=ChatDelta(content=piece.text)))
        if piece.reason is not None:
            choices.append(ChatChunkChoice(index=index, delta=ChatDelta(), finish_reason=piece.reason))
        return [
            ChatCompletionChunk(id=self.id, model=self.model, created=self.created, choices=[choice])
            for choice in choices
        ]

    def last_chunk(self, usage: Usage) -> ChatCompletionChunk:
        return ChatCompletionChunk(id=self.id, model=self.model, created=self.created, choices=[], usage=usage)


async def whole(stream: Stream, answer: Answer) -> Completion | ChatCompletion:
    """Wait for every choice.  Raises ApiError when one fails; its siblings are cancelled then, as at a hang-up."""
    texts, tokens = [Text() for _ in stream.generations], 0
    try:
        async for index, piece in stream:
            texts[index].text += piece.text
            texts[index].reason = _reason(piece)
            tokens += piece.tokens
    except BitdistillError as error:
        raise api_error(error) from error
    finally:
        stream.cancel()
    return answer.whole(texts, answer.usage(tokens))


async def events(stream: Stream, answer: Answer, *, include_usage: bool) -> AsyncIterator[str]:
    """Server-sent events, `[DONE]` last.  An error becomes an event, for the status has been sent by then."""
    left_out = None if include_usage else {"usage"}
    begun: set[int] = set()
    tokens = 0
    try:
        async for index, piece in stream:
            tokens += piece.tokens
            grown = Text(piece.text, _reason(piece))
            if grown.text or grown.reason is not None:
                for chunk in answer.chunks(index, grown, first=index not in begun):
                    yield f"data: {chunk.model_dump_json(exclude=left_out)}\n\n"
                begun.add(index)
        if include_usage:
            yield f"data: {answer.last_chunk(answer.usage(tokens)).model_dump_json()}\n\n"
    except BitdistillError as error:
        yield f"data: {api_error(error).body.model_dump_json()}\n\n"
    yield DONE


def api_error(error: BitdistillError) -> ApiError:
    """What went wrong with a request, with the status that tells a client whether to change it or to repeat it."""
    if isinstance(error, QueueFullError):
        return ApiError(
            429, str(error), type=ErrorType.OVERLOADED, code="queue_full", retry_after_s=error.retry_after_s
        )
    if isinstance(error, CapacityError | ModelError):
        return ApiError(400, str(error))
    return ApiError(503 if isinstance(error, EngineStoppedError) else 500, str(error), type=ErrorType.SERVER)


def _reason(piece: Piece) -> FinishReason | None:
    return REASONS.get(piece.end) if piece.end is not None else None
