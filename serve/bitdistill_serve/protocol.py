"""The OpenAI schema: what `/v1/completions` and `/v1/chat/completions` take and answer.

As at OpenAI, an unknown parameter is refused, not dropped, so that a misspelt `temprature` cannot pass unnoticed.  A
known parameter that this server does not implement passes at its default (clients send those) and is refused by name
otherwise.  A few only label a request (`user`, `metadata`); they change no answer and are taken silently.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictInt,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from bitdistill_ray.decode.generation import FinishReason

LABELS = frozenset({"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "verbosity"})
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
}
MAX_STOPS, MAX_CHOICES = 4, 128


def _is_unicode(text: str) -> str:
    """Refuse half a surrogate pair, which JSON can write (`"\\ud800"`) and no tokenizer can read."""
    if not _printable(text) == text:
        raise PydanticCustomError("invalid_unicode", "Input should be valid Unicode")
    return text


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


Text = Annotated[str, AfterValidator(_is_unicode)]
TokenIds = list[Annotated[StrictInt, Field(ge=0)]]


class ErrorType(StrEnum):
    """OpenAI's kinds of error."""

    INVALID = "invalid_request_error"
    OVERLOADED = "rate_limit_error"
    SERVER = "server_error"


class ErrorDetail(BaseModel):
    """What OpenAI's clients read."""

    message: str
    type: ErrorType
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """The body of every answer that is not a success."""

    error: ErrorDetail


class ApiError(Exception):
    """An HTTP error in OpenAI's schema; `retry_after_s` becomes the Retry-After header."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: ErrorType = ErrorType.INVALID,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.retry_after_s = status, retry_after_s
        self.body = ErrorBody(
            error=ErrorDetail(message=_printable(message), type=type, param=param and _printable(param), code=code)
        )


class StreamOptions(BaseModel):
    """`include_usage` adds a last chunk with the token counts and no choices."""

    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False


class GenerationRequest(BaseModel):
    """What both endpoints share.  `top_k`, `min_p` and `repetition_penalty` are the extensions that vLLM has too."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    model: Text
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    stop: list[Text] = Field(default_factory=list, max_length=MAX_STOPS)
    seed: int | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, body: Any) -> Any:
        return {k: v for k, v in body.items() if v is not None} if isinstance(body, dict) else body

    @model_validator(mode="after")
    def _refuse_what_has_no_effect(self) -> GenerationRequest:
        for name, value in (self.model_extra or {}).items():
            if name in LABELS or any(type(value) is type(v) and value == v for v in NEUTRAL.get(name, ())):
                continue
            if name in NEUTRAL:
                raise PydanticCustomError("unsupported_parameter", "{name} is not supported here", {"name": name})
            raise PydanticCustomError(
                "unknown_parameter", "Unrecognized request argument supplied: {name}", {"name": name}
            )
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError(
                "invalid_value", "{name} is only allowed when stream is true", {"name": "stream_options"}
            )
        return self

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop

    @property
    def includes_usage(self) -> bool:
        """Whether the stream ends with a usage chunk."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`: continue each prompt, given as text or as token ids."""

    prompt: Text | list[Text] | TokenIds | list[TokenIds]
    max_tokens: int = Field(16, ge=1)

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one text or list of ids each."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        texts_or_ids: list[str | list[int]] = [p for p in self.prompt if not isinstance(p, int)]
        return texts_or_ids or [[i for i in self.prompt if isinstance(i, int)]]


class TextPart(BaseModel):
    """One part of a message; images and audio are refused."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: Text


class Message(BaseModel):
    """One turn of a chat."""

    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]
    name: Text | None = None

    def for_template(self) -> dict[str, str]:
        """What a chat template takes; `developer` is OpenAI's newer name of `system`."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": text} | ({"name": self.name} if self.name else {})


class ChatCompletionRequest(GenerationRequest):
    """`POST /v1/chat/completions`: answer the last message, as the tokenizer's chat template writes the turns.

    Without a limit an answer may fill its slot.
    """

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    @property
    def limit(self) -> int | None:
        """The limit on generated tokens, by its newer or its older name."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


class Usage(BaseModel):
    """Token counts of a request, all its choices together; the end token counts as generated."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionChoice(BaseModel):
    """One continuation, or in a stream its next piece."""

    index: int
    text: str
    logprobs: None = None
    finish_reason: FinishReason | None


class ChatMessage(BaseModel):
    """A whole answer."""

    role: Literal["assistant"] = "assistant"
    content: str


class ChatDelta(BaseModel):
    """What an answer grew by: the role in the first chunk, nothing in the last; absent fields are not written."""

    role: Literal["assistant"] | None = None
    content: str | None = None

    @model_serializer
    def _present(self) -> dict[str, str]:
        return {k: v for k, v in (("role", self.role), ("content", self.content)) if v is not None}


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: ChatMessage
    logprobs: None = None
    finish_reason: FinishReason


class ChatChunkChoice(BaseModel):
    """The next piece of one answer."""

    index: int
    delta: ChatDelta
    logprobs: None = None
    finish_reason: FinishReason | None = None


class _Answer(BaseModel):
    id: str
    created: int  # seconds since 1970
    model: str
    usage: Usage | None = None


class Completion(_Answer):
    """The answer of `/v1/completions`, also each chunk of its stream."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]


class ChatCompletion(_Answer):
    """The answer of `/v1/chat/completions`."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]


class ChatCompletionChunk(_Answer):
    """One chunk of a streamed chat completion."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]


class Model(BaseModel):
    """One entry of `/v1/models`; `max_model_len` (tokens of prompt and answer together) is vLLM's extension."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "bitdistill-ray"
    max_model_len: int


class ModelList(BaseModel):
    """`GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[Model]


def validation_error(errors: Sequence[Any]) -> ApiError:
    """The first of FastAPI's validation errors, as OpenAI words it: status 400, the parameter by name."""
    first = errors[0]
    path = [str(part) for part in first["loc"] if part != "body"]
    named = first.get("ctx", {}).get("name")
    if first["type"] == "json_invalid":
        return ApiError(400, "The body of the request is not valid JSON", code="json_invalid")
    param = named or ".".join(path) or None
    message = first["msg"] if named else f"{param or 'body'}: {first['msg']}"
    return ApiError(400, message, param=param, code=first["type"])
