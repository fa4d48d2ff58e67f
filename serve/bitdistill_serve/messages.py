"""The turns of a chat and the tools that it may use, as clients send them and as a chat template takes them.

What a template writes of an earlier call is what its model learns the form from, so arguments reach it as they are,
not as the text in which OpenAI's schema wraps them.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictBool, model_validator
from pydantic_core import PydanticCustomError

from bitdistill_serve.errors import printable


def _is_unicode(text: str) -> str:
    """Refuse half a surrogate pair, which JSON can write (`"\\ud800"`) and no tokenizer can read."""
    if not printable(text) == text:
        raise PydanticCustomError("invalid_unicode", "Input should be valid Unicode")
    return text


Text = Annotated[str, AfterValidator(_is_unicode)]
FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class Strict(BaseModel):
    """No unknown fields, no infinities."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class TextPart(Strict):
    """One part of a message; images and audio are refused."""

    type: Literal["text"]
    text: Text


class FunctionCall(Strict):
    """What a model called, and with what: the text of a JSON object, or none."""

    name: Text
    arguments: Text

    @model_validator(mode="after")
    def _arguments_are_an_object(self) -> FunctionCall:
        if not isinstance(self._parsed(), dict):
            raise PydanticCustomError("invalid_arguments", "arguments should be the text of a JSON object")
        return self

    def for_template(self) -> dict[str, Any]:
        """What a chat template takes: the arguments themselves, which it writes as its model does."""
        return {"name": self.name, "arguments": self._parsed()}

    def _parsed(self) -> Any:
        try:
            return json.loads(self.arguments or "{}")
        except (ValueError, RecursionError):
            return None


class ToolCall(Strict):
    """One call of an earlier answer."""

    id: Text
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Strict):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[TextPart] | None = None
    name: Text | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: Text | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        if self.content is None and not self.tool_calls:
            raise PydanticCustomError("missing", "A message needs content, or tool_calls of the assistant")
        return self

    def for_template(self) -> dict[str, Any]:
        """What a chat template takes; `developer` is OpenAI's newer name of `system`."""
        parts = self.content if isinstance(self.content, list) else []
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in parts)
        turn: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": text}
        if self.tool_calls:
            turn["tool_calls"] = [call.model_dump() | {"function": call.function.for_template()} for call in
                                  self.tool_calls]  # fmt: skip
        return turn | {k: v for k in ("name", "tool_call_id") if (v := getattr(self, k))}


class Function(Strict):
    """A function that the model may call; `parameters` is the JSON schema of an object, none: it takes no arguments.

    A call that was asked for (`tool_choice`) is always of that schema, one of the model's own accord where the function
    is `strict`; else it has the arguments that the model wrote.
    """

    name: FunctionName
    description: Text | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)
    strict: StrictBool | None = None

    @model_validator(mode="after")
    def _takes_an_object(self) -> Function:
        if self.parameters.get("type", "object") != "object":
            raise PydanticCustomError("invalid_parameters", "parameters should be a schema of type object")
        return self


class Tool(Strict):
    """What the chat template is told of a function."""

    type: Literal["function"]
    function: Function

    def for_template(self) -> dict[str, Any]:
        """What a chat template takes; `strict` is this server's affair."""
        return {"type": self.type, "function": self.function.model_dump(exclude_none=True, exclude={"strict"})}


class FunctionChoice(Strict):
    """One function by its name."""

    name: FunctionName


class ToolChoice(Strict):
    """The function that must be called."""

    type: Literal["function"]
    function: FunctionChoice
