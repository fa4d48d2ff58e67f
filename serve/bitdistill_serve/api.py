"""The HTTP routes, over any `Service`; nothing here knows Ray, so the tests call it in-process."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from bitdistill_ray.errors import BitdistillError
from bitdistill_serve.answers import Answer, ChatAnswer, CompletionAnswer, api_error, events, whole
from bitdistill_serve.batch import Generation
from bitdistill_serve.engine import Status, Stream
from bitdistill_serve.protocol import (
    ApiError,
    ChatCompletionRequest,
    CompletionRequest,
    ErrorBody,
    ErrorType,
    GenerationRequest,
    Model,
    ModelList,
    validation_error,
)
from bitdistill_serve.service import Service

KNOWN_ERRORS: dict[int | str, dict[str, Any]] = {s: {"model": ErrorBody} for s in (400, 404, 429, 500, 503)}


class EventStream(StreamingResponse):
    """Server-sent events.  However the response ends (a client may hang up at any point), its slots are freed."""

    def __init__(self, content: AsyncIterator[str], stream: Stream) -> None:
        super().__init__(content, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._stream.cancel()


def create_api(service: Callable[[], Service]) -> FastAPI:
    """The application; `service` is asked at each request, for Serve makes the routes before it makes the replica."""
    api = FastAPI(title="bitdistill", responses=KNOWN_ERRORS)
    api.include_router(router)
    api.state.service = service
    for error in (ApiError, RequestValidationError, HTTPException, Exception):
        api.add_exception_handler(error, _refuse)
    return api


def _service(request: Request) -> Service:
    service: Service = request.app.state.service()
    return service


Served = Annotated[Service, Depends(_service)]
router = APIRouter()


@router.get("/health", responses={503: {}})
async def health(service: Served) -> JSONResponse:
    """200 while the engine works (`degraded`: a call failed, the next may not), 503 when it must be restarted."""
    health = service.engine.health()
    body = dataclasses.asdict(health) | {"status": health.status.value}
    return JSONResponse(body, status_code=503 if health.status is Status.FAILING else 200)


@router.get("/v1/models")
async def list_models(service: Served) -> ModelList:
    """The one model."""
    return ModelList(data=[_model(service)])


@router.get("/v1/models/{name:path}")
async def retrieve_model(name: str, service: Served) -> Model:
    """One model by its id."""
    _check_name(service, name)
    return _model(service)


@router.post("/v1/completions", response_model=None)
async def completions(body: CompletionRequest, request: Request, service: Served) -> Response | BaseModel:
    """Continue prompts."""
    _check_name(service, body.model)
    generations = await service.prompts.completion(body)
    return await _answer(service, request, body, generations, CompletionAnswer, "cmpl")


@router.post("/v1/chat/completions", response_model=None)
async def chat_completions(body: ChatCompletionRequest, request: Request, service: Served) -> Response | BaseModel:
    """Answer the last message."""
    _check_name(service, body.model)
    generations = await service.prompts.chat(body)
    return await _answer(service, request, body, generations, ChatAnswer, "chatcmpl")


async def _answer(
    service: Service,
    request: Request,
    body: GenerationRequest,
    generations: Sequence[Generation],
    shape: type[Answer],
    prefix: str,
) -> Response | BaseModel:
    if len(generations) > service.engine.limit:
        raise ApiError(400, f"{len(generations)} choices asked for; this server takes {service.engine.limit} at a time")
    try:
        stream = service.engine.submit(generations)
    except BitdistillError as error:
        raise api_error(error) from error
    request_id = (
        request.headers.get("x-request-id") or uuid.uuid4().hex
    )  # Ray Serve's proxy sets it, and answers with it
    answer = shape(
        id=f"{prefix}-{request_id}",
        model=service.name,
        prompt_tokens=sum(len(g.prompt) for g in generations) // body.n,
    )
    if body.stream:
        return EventStream(events(stream, answer, include_usage=body.includes_usage), stream)
    return await whole(stream, answer)


def _model(service: Service) -> Model:
    return Model(id=service.name, created=service.created, max_model_len=service.engine.slot_tokens)


def _check_name(service: Service, name: str) -> None:
    if name != service.name:
        raise ApiError(404, f"The model {name!r} does not exist; this server has {service.name!r}",
                       param="model", code="model_not_found")  # fmt: skip


async def _refuse(_: Request, error: Exception) -> JSONResponse:
    """Any error in OpenAI's schema."""
    if isinstance(error, RequestValidationError):
        error = validation_error(error.errors())
    elif isinstance(error, HTTPException):
        error = ApiError(error.status_code, str(error.detail))
    elif not isinstance(error, ApiError):  # a bug; Starlette logs its traceback
        error = ApiError(500, "Internal server error", type=ErrorType.SERVER)
    headers = {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
    return JSONResponse(error.body.model_dump(mode="json"), status_code=error.status, headers=headers)
