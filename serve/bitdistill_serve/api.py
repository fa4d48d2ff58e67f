"""The HTTP routes, over any `Service`; nothing here knows Ray, so the tests call it in-process."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from bitdistill_ray.errors import BitdistillError
from bitdistill_serve import metrics
from bitdistill_serve.answers import Answer, ChatAnswer, CompletionAnswer, collected, events, whole
from bitdistill_serve.classify import classification
from bitdistill_serve.engine import Status, Stream
from bitdistill_serve.errors import ApiError, ErrorBody, ErrorType, api_error, validation_error
from bitdistill_serve.generation import Generation
from bitdistill_serve.guard import Guard, error_response
from bitdistill_serve.page import POLICY, page
from bitdistill_serve.rates import Client
from bitdistill_serve.replies import ChatCompletion, Classification, Completion, HealthReport, Model, ModelList
from bitdistill_serve.requests import ChatCompletionRequest, ClassifyRequest, CompletionRequest, GenerationRequest
from bitdistill_serve.service import Service

REFUSALS = {
    400: "a parameter is wrong",
    401: "no valid API key",
    404: "no such model",
    408: "the body came too slowly",
    413: "the body is too large",
    415: "not JSON",
    429: "the queue is full, or a rate is used up",
    431: "too many headers",
    500: "a bug, or a decoder that failed",
    503: "no slot in time, or the engine has ended",
    504: "it took too long",
}
EVENTS: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {"text/event-stream": {"schema": {"description": "Chunks, an error perhaps, and then [DONE]"}}},
        "description": "The answer, or its stream",
    }
}


def _refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorBody, "description": REFUSALS[status]} for status in statuses}


GET_REFUSALS = _refusals(401, 404, 429, 431, 500)
POST_REFUSALS = _refusals(*REFUSALS)


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
    api = FastAPI(title="bitdistill", summary="Packed students behind OpenAI's API", docs_url=None, redoc_url=None)
    api.include_router(router)
    api.state.service = service
    api.add_middleware(Guard, service=service)
    for error in (ApiError, RequestValidationError, HTTPException, Exception):
        api.add_exception_handler(error, _refuse)
    described = api.openapi

    def openapi() -> dict[str, Any]:
        """FastAPI's document without the 422 that it adds to each route: `_refuse` answers 400."""
        document = described()
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        return document

    api.openapi = openapi  # type: ignore[method-assign]
    return api


async def _service(request: Request) -> Service:  # not async, it would run in a thread of its own
    service: Service = request.app.state.service()
    return service


Served = Annotated[Service, Depends(_service)]
Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]


async def _client(request: Request, service: Served, credentials: Credentials) -> Client:
    """Who asks.  Raises ApiError without a valid key where one is needed, and when its requests are used up."""
    client = service.client(credentials.credentials if credentials else None, request.client)
    if client is None:
        raise ApiError(401, "Send Authorization: Bearer KEY with a key that this server knows",
                       type=ErrorType.AUTHENTICATION, code="invalid_api_key")  # fmt: skip
    await client.ask()
    return client


Known = Annotated[Client, Depends(_client)]
router = APIRouter()


@router.get("/", include_in_schema=False)
async def playground() -> HTMLResponse:
    """A page to try the model with."""
    return HTMLResponse(page(), headers={"Content-Security-Policy": POLICY, "Referrer-Policy": "no-referrer"})


@router.get("/health", responses={503: {"model": HealthReport}, **_refusals(431, 500)})
async def health(service: Served) -> HealthReport:
    """200 while the engine works (`degraded`: a call failed, the next may not), 503 when it must be restarted."""
    health = service.engine.health()
    report = HealthReport(**dataclasses.asdict(health) | {"status": health.status.value})
    if health.status is Status.FAILING:
        return JSONResponse(report.model_dump(), status_code=503)  # type: ignore[return-value]
    return report


@router.get(
    "/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}, **_refusals(431, 500)}
)
async def prometheus(service: Served) -> Response:
    """What Prometheus reads."""
    return Response(service.engine.metrics(), media_type=metrics.CONTENT_TYPE)


@router.get("/v1/models", responses=_refusals(401, 429, 431, 500))
async def list_models(service: Served, client: Known) -> ModelList:
    """The one model."""
    return ModelList(data=[_model(service)])


@router.get("/v1/models/{name:path}", responses=GET_REFUSALS)
async def retrieve_model(name: str, service: Served, client: Known) -> Model:
    """One model by its id."""
    _check_name(service, name)
    return _model(service)


@router.post("/v1/completions", response_model=Completion, responses=EVENTS | POST_REFUSALS)
async def completions(
    body: CompletionRequest, request: Request, service: Served, client: Known
) -> Response | BaseModel:
    """Continue prompts."""
    _check_name(service, body.model)
    generations = await service.prompts.completion(body)
    answer = CompletionAnswer(
        **_envelope(service, request, "cmpl", body, generations),
        echo=await service.prompts.texts(body.prompts) if body.echo else None,
    )
    return await _answer(service, client, body, answer)


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses=EVENTS | POST_REFUSALS)
async def chat_completions(
    body: ChatCompletionRequest, request: Request, service: Served, client: Known
) -> Response | BaseModel:
    """Answer the last message."""
    _check_name(service, body.model)
    chat = await service.prompts.chat(body)
    envelope = _envelope(service, request, "chatcmpl", body, chat.generations)
    answer = ChatAnswer(**envelope, reader=chat.reader, called=service.metrics.tool_calls.inc)
    return await _answer(service, client, body, answer)


@router.post("/v1/classify", responses=POST_REFUSALS)
async def classify(body: ClassifyRequest, request: Request, service: Served, client: Known) -> Classification:
    """Choose one of several labels for each input."""
    _check_name(service, body.model)
    generations = await service.prompts.classify(body)
    stream = await _submitted(service, client, generations, prompts=len(generations))
    pieces, count = await collected(stream, client.charge)
    id = f"cls-{request.state.request_id}"
    return classification(body, generations, pieces, count, id=id, model=service.name)


def _envelope(
    service: Service, request: Request, prefix: str, body: GenerationRequest, generations: Sequence[Generation]
) -> dict[str, Any]:
    return {
        "id": f"{prefix}-{request.state.request_id}",
        "model": service.name,
        "generations": generations,
        "choices": body.n,
        "texts": service.texts,
    }


async def _answer(service: Service, client: Client, body: GenerationRequest, answer: Answer) -> Response | BaseModel:
    stream = await _submitted(service, client, answer.generations, prompts=len(answer.generations) // body.n)
    if body.stream:
        sent = events(stream, answer, client.charge, body.streamed)
        return EventStream(sent, stream)
    return await whole(stream, answer, client.charge)


async def _submitted(service: Service, client: Client, generations: Sequence[Generation], *, prompts: int) -> Stream:
    """The stream of `generations`, whose prompts (some of them the same) were paid for.  Raises ApiError."""
    if len(generations) > service.engine.limit:
        raise ApiError(400, f"{len(generations)} choices asked for; this server takes {service.engine.limit} at a time")
    await client.spend(sum(len(g.prompt) for g in generations) * prompts // len(generations))
    try:
        return service.engine.submit(generations, client=client.name)
    except BitdistillError as error:
        raise api_error(error) from error


def _model(service: Service) -> Model:
    return Model(id=service.name, created=service.created, max_model_len=service.engine.slot_tokens)


def _check_name(service: Service, name: str) -> None:
    if name != service.name:
        raise ApiError(404, f"The model {name!r} does not exist; this server has {service.name!r}",
                       param="model", code="model_not_found")  # fmt: skip


async def _refuse(_: Request, error: Exception) -> JSONResponse:
    """Any error in OpenAI's schema."""
    if isinstance(error, RequestValidationError):
        return error_response(validation_error(error.errors()))
    if isinstance(error, HTTPException):
        refusal = error_response(ApiError(error.status_code, str(error.detail)))
        refusal.headers.update(error.headers or {})  # a 405 names what is allowed
        return refusal
    if isinstance(error, ApiError):
        return error_response(error)
    return error_response(ApiError(500, "Internal server error", type=ErrorType.SERVER))  # a bug; Starlette logs it
