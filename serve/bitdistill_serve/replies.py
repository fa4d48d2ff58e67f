"""What this server answers, in OpenAI's schema; `/v1/classify` is ours."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from bitdistill_ray.decode.generation import FinishReason


def _is_absent(value: object) -> bool:
    return value is None


class PromptDetails(BaseModel):
    """`cached_tokens` of the prompt were in the cache already."""

    cached_tokens: int = 0


class Usage(BaseModel):
    """Token counts of a request, all its choices together; the end token counts as generated."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class CompletionLogprobs(BaseModel):
    """Four lists of the same length, one entry a token.  The first token of a prompt has no log-probability.

    A token that is not whole characters is written `bytes:\\xe2\\x96`, as OpenAI does.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One continuation, or in a stream its next piece."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None


class Alternative(BaseModel):
    """A token and how likely it was."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(Alternative):
    """A token of the answer, and the likeliest ones in its place."""

    top_logprobs: list[Alternative]


class ChatLogprobs(BaseModel):
    """The tokens of an answer, or in a stream of its next piece."""

    content: list[ChatTokenLogprob]
    refusal: None = None


class CalledFunction(BaseModel):
    """What was called, and with what: the text of a JSON object."""

    name: str
    arguments: str


class ToolCall(BaseModel):
    """One call; its answer names it by `id`."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class ToolCallDelta(ToolCall):
    """A call in a stream, whole; `index` counts those of its answer."""

    index: int


class ChatMessage(BaseModel):
    """A whole answer; one that only calls tools has no content."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    tool_calls: list[ToolCall] | None = Field(None, exclude_if=_is_absent)


class ChatDelta(BaseModel):
    """What an answer grew by: the role in the first chunk, nothing in the last; absent fields are not written."""

    role: Literal["assistant"] | None = Field(None, exclude_if=_is_absent)
    content: str | None = Field(None, exclude_if=_is_absent)
    tool_calls: list[ToolCallDelta] | None = Field(None, exclude_if=_is_absent)


TOOL_CALLS: Literal["tool_calls"] = "tool_calls"
ChatFinish = FinishReason | Literal["tool_calls"]


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: ChatFinish


class ChatChunkChoice(BaseModel):
    """The next piece of one answer."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: ChatFinish | None = None


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


class LabelScore(BaseModel):
    """A label: its log-probability (the sum or the mean over its tokens), and its share among the labels."""

    label: str
    logprob: float
    probability: float


class Classified(BaseModel):
    """One input: the likeliest label, and all of them in the order in which they were given."""

    index: int
    label: str
    scores: list[LabelScore]


class Classification(BaseModel):
    """The answer of `/v1/classify`."""

    id: str
    object: Literal["classification"] = "classification"
    created: int
    model: str
    data: list[Classified]
    usage: Usage


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


class HealthReport(BaseModel):
    """`GET /health`."""

    status: Literal["ok", "degraded", "failing"]
    running: int
    waiting: int
    slots: int
    queue: int
    memory_bytes: int | None
    last_failure: str | None
