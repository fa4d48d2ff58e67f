"""What every request passes before its route: size, form and pace of what came, an id, a count of what was answered.

The body is read here, whole, up to a size and within a time; a route never meets half a request, and a client that
sends slowly or too much holds nothing but its connection.  Where there is no place for another text, that is said
before anything of the request is looked at: refusals must stay cheap when most requests get one.
"""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bitdistill_serve.errors import ApiError, api_error

if TYPE_CHECKING:
    from bitdistill_serve.service import Service  # torch comes with it, and a router needs none

TEXTS = ("/v1/completions", "/v1/chat/completions", "/v1/classify")
MOST_HEADERS, MOST_HEADER_BYTES = 100, 32 << 10
_ID = re.compile(rb"[A-Za-z0-9_.:-]{1,128}")


class Guard:
    """ASGI middleware over `app`; `service` is asked at each request."""

    def __init__(self, app: ASGIApp, service: Callable[[], Service]) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        service = self._service()
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        id = given.decode() if _ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = id
        status = 500

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if not given:  # Ray Serve's proxy sets one, and answers with it itself
                    message["headers"] = [*message.get("headers", ()), (b"x-request-id", id.encode())]
            await send(message)

        try:
            try:
                limits = service.options
                replayed = await checked(scope, receive, body_bytes=limits.body_bytes, body_s=limits.body_s)
            except ApiError as error:
                await error_response(error)(scope, receive, answer)
            else:
                refused = refusal(service, scope)
                await (error_response(refused) if refused else self._app)(scope, replayed, answer)
        finally:
            unrouted: str = scope["path"] if scope["path"] in TEXTS else "other"  # as what is refused above
            route: str = getattr(scope.get("route"), "path", unrouted)
            service.metrics.answered(route, status)


def refusal(service: Service, scope: Scope) -> ApiError | None:
    """The 429 of a request to write or score text, where its client has no place; keys are the routes' matter."""
    if scope["method"] != "POST" or scope["path"] not in TEXTS:
        return None
    given = next((value for name, value in scope["headers"] if name == b"authorization"), b"").decode("latin-1")
    client = service.client(given.removeprefix("Bearer "), scope.get("client"))
    error = service.engine.refusal(client.name) if client else None
    return api_error(error) if error else None


def error_response(error: ApiError) -> JSONResponse:
    """An error in OpenAI's schema."""
    return JSONResponse(error.body.model_dump(mode="json"), status_code=error.status, headers=error.headers)


async def checked(scope: Scope, receive: Receive, *, body_bytes: int, body_s: float) -> Receive:
    """A `receive` that gives the body in one message.  Raises ApiError."""
    headers = scope["headers"]
    if len(headers) > MOST_HEADERS or sum(len(n) + len(v) for n, v in headers) > MOST_HEADER_BYTES:
        raise ApiError(431, f"More than {MOST_HEADERS} headers, or more than {MOST_HEADER_BYTES} bytes of them")
    if scope["method"] != "POST":
        return receive
    kind = next((value for name, value in headers if name == b"content-type"), b"")
    if kind.split(b";")[0].strip().lower() != b"application/json":
        raise ApiError(415, "Send Content-Type: application/json")
    try:
        async with asyncio.timeout(body_s):
            body = await _body(headers, receive, body_bytes)
    except TimeoutError:
        raise ApiError(408, f"The body did not come within {body_s:g} s") from None
    sent = False

    async def replayed() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed


async def _body(headers: list[tuple[bytes, bytes]], receive: Receive, most: int) -> bytes:
    promised = next((value for name, value in headers if name == b"content-length"), b"0")
    if not promised.isdigit() or len(promised) > 12 or int(promised) > most:
        raise ApiError(413, f"The body of a request may have {most} bytes")
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ApiError(400, "The client hung up before the end of its request")
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > most:
            raise ApiError(413, f"The body of a request may have {most} bytes")
        if not message.get("more_body", False):
            return b"".join(parts)
