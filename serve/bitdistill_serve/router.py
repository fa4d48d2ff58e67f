"""Several models or replicas behind one address: a request goes to the deployment of the model that it names.

The router reads a request's `model` and nothing else of it; keys, limits and routes are the replica's, so a model
answers the same here as alone.  What belongs to all models (the list, health, metrics) is put together from theirs.
A request whose replica dies before anything was sent is sent to another one; `/metrics` counts those.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from fastapi.responses import JSONResponse, Response
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bitdistill_serve import metrics
from bitdistill_serve.errors import ApiError, ErrorType
from bitdistill_serve.forward import Forwarded
from bitdistill_serve.guard import checked, error_response
from bitdistill_serve.options import ServeOptions

REPLICAS_TRIED = 3
SEVERITY = ("ok", "degraded", "failing")


class Router:
    """The ingress.  `options` are those of the models by name; body limits are the largest of theirs."""

    def __init__(self, options: Mapping[str, ServeOptions], handles: Mapping[str, DeploymentHandle]) -> None:
        self._handles = dict(handles)
        self._body_bytes = max(of.body_bytes for of in options.values())
        self._body_s = max(of.body_s for of in options.values())
        self._metrics = metrics.RouterMetrics(self._handles)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Serve asks for the routes once the handles are here."""
        return Starlette(routes=[Mount("/", self._answer)])

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            replay = await checked(scope, receive, body_bytes=self._body_bytes, body_s=self._body_s)
            body = (await replay()).get("body", b"") if scope["method"] == "POST" else b""
            request = Forwarded(scope["method"], scope["path"], scope["headers"], body, scope.get("client"))
            if request.path in ("/health", "/v1/models", "/metrics") and request.method == "GET":
                await (await self._of_all(request))(scope, receive, send)
            else:
                async with aclosing(self._answers(self._chosen(request), request)) as answers:
                    async for messages in answers:
                        for message in messages:
                            await send(message)
        except ApiError as error:
            await error_response(error)(scope, receive, send)

    def _chosen(self, request: Forwarded) -> str:
        """The model that a request names, by its body or its path; the first one, where it needs none."""
        name: Any = None
        if request.path.startswith("/v1/models/"):
            name = request.path.removeprefix("/v1/models/")
        elif request.method == "POST":
            try:
                parsed = json.loads(request.body)
            except (ValueError, RecursionError):  # the routes say what is wrong with it
                parsed = None
            name = parsed.get("model") if isinstance(parsed, dict) else None
        if isinstance(name, str) and name not in self._handles:
            raise ApiError(404, f"The model {name!r} does not exist; this server has {', '.join(self._handles)}",
                           param="model", code="model_not_found")  # fmt: skip
        return name if isinstance(name, str) else next(iter(self._handles))

    async def _answers(self, model: str, request: Forwarded) -> AsyncGenerator[list[Message], None]:
        """What a replica answers, as it comes; what another one does, where the first dies before it said anything."""
        for replicas_left in reversed(range(REPLICAS_TRIED)):
            answer, begun = self._handles[model].options(stream=True).forward.remote(request), False
            try:
                async for messages in answer:
                    begun = True
                    yield messages
                return
            except BackPressureError as error:
                raise ApiError(429, "Too many requests wait for this model", type=ErrorType.OVERLOADED,
                               code="queue_full", retry_after_s=1) from error  # fmt: skip
            except RayActorError:
                if begun or not replicas_left:
                    raise
                self._metrics.resent(model)
            finally:
                answer.cancel()

    async def _of_all(self, request: Forwarded) -> Response:
        """The list, health or metrics of every model in one."""
        whole = [self._whole(model, request) for model in self._handles]
        statuses, bodies = zip(*await asyncio.gather(*whole), strict=True)
        refused = next((i for i, status in enumerate(statuses) if status not in (200, 503)), None)
        if refused is not None:
            return Response(bodies[refused], statuses[refused], media_type="application/json")
        if request.path == "/metrics":
            return Response(metrics.merged([*bodies, self._metrics.text()]), media_type=metrics.CONTENT_TYPE)
        if len(self._handles) == 1:  # as it answers without a router
            return Response(bodies[0], statuses[0], media_type="application/json")
        documents = [json.loads(body) for body in bodies]
        if request.path == "/v1/models":
            return JSONResponse({"object": "list", "data": [model for of in documents for model in of["data"]]})
        worst = max((of["status"] for of in documents), key=SEVERITY.index)
        report = dict(zip(self._handles, documents, strict=True))
        return JSONResponse({"status": worst, "models": report}, status_code=max(statuses))

    async def _whole(self, model: str, request: Forwarded) -> tuple[int, bytes]:
        messages = [m async for several in self._answers(model, request) for m in several]
        return int(messages[0]["status"]), b"".join(m.get("body", b"") for m in messages[1:])
