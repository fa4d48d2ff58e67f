"""What clients send, in OpenAI's schema: `/v1/completions`, `/v1/chat/completions`, and `/v1/classify`, which is ours.

As at OpenAI, an unknown parameter is refused, not dropped, so that a misspelt `temprature` cannot pass unnoticed.  A
known parameter that this server does not implement passes at its default (clients send those) and is refused by name
otherwise.  A few only label a request (`user`, `metadata`); they change no answer and are taken silently.
"""

from __future__ import annotations

from abc import abstractmethod
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, model_validator
from pydantic_core import PydanticCustomError

from bitdistill_serve.messages import Function, Message, Strict, Text, Tool, ToolChoice

LABELS = frozenset({"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "verbosity"})
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "suffix": ("",),
}
MAX_STOPS, MAX_CHOICES, MAX_BIASES, MAX_LOGPROBS = 16, 128, 1024, 20  # stops: OpenAI takes 4, harnesses send more
MAX_TOOLS = 128


def refused(kind: str, message: str, name: str) -> PydanticCustomError:
    """A validation error about the parameter `name`, which its message may quote as {name}."""
    return PydanticCustomError(kind, message, {"name": name})


TokenIds = list[Annotated[StrictInt, Field(ge=0)]]
Bias = Annotated[StrictFloat, Field(ge=-100, le=100)]
TokenId = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]


class StreamOptions(Strict):
    """`include_usage` adds a last chunk with the token counts and no choices.

    `continuous_usage_stats`, as vLLM has it, also adds the counts so far to every chunk.
    """

    include_usage: StrictBool = False
    continuous_usage_stats: StrictBool = False


class JsonSchema(Strict):
    """What OpenAI calls a structured output; `strict` is always on, `name` and `description` only label it."""

    name: Text
    description: Text | None = None
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: StrictBool | None = None


class TextFormat(Strict):
    """No constraint."""

    type: Literal["text"]


class JsonObject(Strict):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchemaFormat(Strict):
    """JSON of one schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObject | JsonSchemaFormat, Field(discriminator="type")]


class Named(BaseModel):
    """What every request has; a null is as if the parameter were absent."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    model: Text

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, body: Any) -> Any:
        return {k: v for k, v in body.items() if v is not None} if isinstance(body, dict) else body

    @model_validator(mode="after")
    def _refuse_what_has_no_effect(self) -> Named:
        for name, value in (self.model_extra or {}).items():
            if name in LABELS or any(type(value) is type(v) and value == v for v in NEUTRAL.get(name, ())):
                continue
            if name in NEUTRAL:
                raise refused("unsupported_parameter", "{name} is not supported here", name)
            raise refused("unknown_parameter", "Unrecognized request argument supplied: {name}", name)
        return self


class GenerationRequest(Named):
    """What both endpoints share.

    Sampling has vLLM's extensions (`top_k`, `min_p`, `repetition_penalty`, `ignore_eos`), and so has the constraint of
    a text: `guided_choice` (one of these), `guided_regex`, `guided_json` (a schema).
    """

    max_tokens: StrictInt | None = Field(None, ge=1)
    temperature: StrictFloat = Field(1.0, ge=0, le=2)
    top_p: StrictFloat = Field(1.0, gt=0, le=1)
    top_k: StrictInt = Field(0, ge=0)
    min_p: StrictFloat = Field(0.0, ge=0, le=1)
    repetition_penalty: StrictFloat = Field(1.0, ge=0.01, le=100)
    presence_penalty: StrictFloat = Field(0.0, ge=-2, le=2)
    frequency_penalty: StrictFloat = Field(0.0, ge=-2, le=2)
    logit_bias: dict[TokenId, Bias] = Field(default_factory=dict, max_length=MAX_BIASES)
    n: StrictInt = Field(1, ge=1, le=MAX_CHOICES)
    stop: Text | Annotated[list[Text], Field(max_length=MAX_STOPS)] = Field(default_factory=list)
    seed: StrictInt | None = None
    ignore_eos: StrictBool = False
    stream: StrictBool = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat = TextFormat(type="text")
    guided_choice: list[Text] | None = Field(None, min_length=1, max_length=1024)
    guided_regex: Text | None = Field(None, min_length=1)
    guided_json: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _refuse_what_contradicts(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise refused("invalid_value", "{name} is only allowed when stream is true", "stream_options")
        if len(self.constrained) > 1:
            raise refused("invalid_value", "{name}: a text can have one constraint", self.constrained[0])
        return self

    @property
    def constrained(self) -> list[str]:
        """The parameters that constrain the text."""
        guides = ("guided_choice", "guided_regex", "guided_json")
        given = [name for name in guides if getattr(self, name) is not None]
        return given + ["response_format"] * (self.response_format.type != "text")

    @property
    def stops(self) -> tuple[str, ...]:
        """The strings that end a text."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    @abstractmethod
    def alternatives(self) -> int | None:
        """How many likelier tokens are told beside each token; None: no log-probabilities at all."""

    @property
    def streamed(self) -> StreamOptions:
        """`stream_options`, or what stands for them."""
        return self.stream_options or StreamOptions()


class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`: continue each prompt, given as text or as token ids.

    `echo` repeats the prompt before its continuation, with `logprobs` those of the prompt too; then `max_tokens` may be
    0, to score a text only.
    """

    prompt: Text | list[Text] | TokenIds | list[TokenIds]
    max_tokens: StrictInt = Field(16, ge=0)
    echo: StrictBool = False
    logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_LOGPROBS)] | Literal[False] | None = None

    @model_validator(mode="after")
    def _nothing_is_asked_for(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise refused("invalid_value", "{name} can be 0 with echo only", "max_tokens")
        return self

    @property
    def alternatives(self) -> int | None:
        return None if self.logprobs is None or self.logprobs is False else self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one text or list of ids each."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        texts_or_ids: list[str | list[int]] = [p for p in self.prompt if not isinstance(p, int)]
        return texts_or_ids or [[i for i in self.prompt if isinstance(i, int)]]


class ChatCompletionRequest(GenerationRequest):
    """`POST /v1/chat/completions`: answer the last message, as the tokenizer's chat template writes the turns.

    Without a limit an answer may fill its slot.
    """

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: StrictInt | None = Field(None, ge=1)
    logprobs: StrictBool = False
    top_logprobs: StrictInt = Field(0, ge=0, le=MAX_LOGPROBS)
    tools: list[Tool] = Field(default_factory=list, max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | ToolChoice = "auto"
    parallel_tool_calls: StrictBool = True

    @model_validator(mode="after")
    def _alternatives_of_nothing(self) -> ChatCompletionRequest:
        if self.top_logprobs and not self.logprobs:
            raise refused("invalid_value", "{name} is only allowed when logprobs is true", "top_logprobs")
        return self

    @model_validator(mode="after")
    def _can_be_called(self) -> ChatCompletionRequest:
        names = [tool.function.name for tool in self.tools]
        if len(set(names)) < len(names):
            raise refused("invalid_value", "{name} must have different names", "tools")
        if self.tool_choice not in ("none", "auto") and not self.must_call:
            raise refused("invalid_value", "{name} asks for a function that is not among the tools", "tool_choice")
        if self.constrained and self.must_call:
            raise refused("invalid_value", "{name}: a text can have one constraint", "tool_choice")
        if self.constrained and self.may_call_strictly:
            raise refused("invalid_value", "{name}: a strict function is a constraint; a text can have one", "tools")
        return self

    @property
    def offered(self) -> list[Tool]:
        """The tools that the model is told of."""
        return [] if self.tool_choice == "none" else self.tools

    @property
    def must_call(self) -> list[Function]:
        """The functions of which one must be called; none: the model may answer as it likes."""
        if self.tool_choice in ("none", "auto"):
            return []
        chosen = self.tool_choice.function.name if isinstance(self.tool_choice, ToolChoice) else None
        return [tool.function for tool in self.tools if chosen in (None, tool.function.name)]

    @property
    def may_call_strictly(self) -> list[Function]:
        """The functions that the model may call, where one of them is `strict`; else none."""
        functions = [tool.function for tool in self.tools] if self.tool_choice == "auto" else []
        return functions if any(function.strict for function in functions) else []

    @property
    def alternatives(self) -> int | None:
        return self.top_logprobs if self.logprobs else None

    @property
    def limit(self) -> int | None:
        """The limit on generated tokens, by its newer or its older name."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


class Normalize(StrEnum):
    """How a label's log-probability is made from those of its tokens."""

    SUM = "sum"  # as `bitdistill evaluate` scores tasks
    MEAN = "mean"  # labels of different lengths on one scale


class ClassifyRequest(Named):
    """`POST /v1/classify`: how likely the model holds each label after the input, a text or a chat."""

    input: Text | Annotated[list[Text], Field(min_length=1)] | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    labels: list[Annotated[Text, Field(min_length=1)]] = Field(min_length=2, max_length=1024)
    normalize: Normalize = Normalize.SUM

    @model_validator(mode="after")
    def _one_of_both(self) -> ClassifyRequest:
        if (self.input is None) == (self.messages is None):
            raise refused("invalid_value", "Give {name} or messages", "input")
        if len(set(self.labels)) != len(self.labels):
            raise refused("invalid_value", "{name} must differ from each other", "labels")
        return self

    @property
    def inputs(self) -> list[str]:
        """The texts; empty for a chat."""
        return [self.input] if isinstance(self.input, str) else self.input or []
