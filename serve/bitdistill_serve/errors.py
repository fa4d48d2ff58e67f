"""Every refusal in OpenAI's schema: the status that tells a client whether to change its request or to repeat it."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Any

from pydantic import BaseModel

from bitdistill_ray.decode.base import CapacityError
from bitdistill_ray.errors import BitdistillError, ModelError, ServeError

LONGEST_MESSAGE = 1000  # characters: an error that quotes a hostile value stays short


class QueueFullError(ServeError):
    """No place is left.  `retry_after_s` estimates when one will be."""

    retry_after_s: int = 1


class EngineStoppedError(ServeError):
    """The engine has ended, or is ending; another replica may answer."""


class QueueTimeoutError(ServeError):
    """A request waited for a slot longer than it may."""


class DeadlineError(ServeError):
    """A request took longer than it may."""


class LedgerAwayError(ServeError):
    """What counts rates over all replicas did not answer."""


class GrammarError(ServeError):
    """A constraint that cannot go on: it grew beyond the library's limits."""


class ErrorType(StrEnum):
    """OpenAI's kinds of error."""

    INVALID = "invalid_request_error"
    AUTHENTICATION = "authentication_error"
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
        text, param = printable(message)[:LONGEST_MESSAGE], param and printable(param)[:LONGEST_MESSAGE]
        self.body = ErrorBody(error=ErrorDetail(message=text, type=type, param=param, code=code))

    @property
    def headers(self) -> dict[str, str]:
        """What HTTP says beside the body."""
        headers = {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


def printable(text: str) -> str:
    """`text` with each half of a surrogate pair, which JSON can write and UTF-8 cannot, as an escape."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def api_error(error: BitdistillError) -> ApiError:
    """What went wrong with a request that reached the engine."""
    if isinstance(error, QueueFullError):
        return ApiError(
            429, str(error), type=ErrorType.OVERLOADED, code="queue_full", retry_after_s=error.retry_after_s
        )
    if isinstance(error, QueueTimeoutError):
        return ApiError(503, str(error), type=ErrorType.SERVER, code="queue_timeout", retry_after_s=1)
    if isinstance(error, DeadlineError):
        return ApiError(504, str(error), type=ErrorType.SERVER, code="timeout")
    if isinstance(error, CapacityError | ModelError | GrammarError):
        return ApiError(400, str(error))
    return ApiError(503 if isinstance(error, EngineStoppedError) else 500, str(error), type=ErrorType.SERVER)


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
