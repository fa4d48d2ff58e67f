"""The Ray Serve application: `serve run bitdistill_serve.app:build model=PATH [KEY=VALUE …]` (keys: `options.py`).

One model in one replica is one deployment, which holds the engine and answers HTTP itself.  Several models (`models` of
a configuration file, `cluster/serve.yaml`) are a deployment each, which scale by themselves, behind a router; so is one
model with `max_replicas`, so that a request outlives the replica that it was sent to.  Where keys are asked for, those
replicas count their rates together (`shares.py`).

Ray Serve lets more requests in than the engine takes, so that it is the engine that refuses, at once and with a
Retry-After it can estimate; requests beyond that wait in Serve's router, where the next replica would take them.

A replica that is to stop, because a new version or fewer requests came, takes no new requests and finishes its streams.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application, Deployment
from ray.serve.handle import DeploymentHandle
from starlette.types import Message

from bitdistill_ray.errors import ServeError
from bitdistill_serve.api import create_api
from bitdistill_serve.engine import Status
from bitdistill_serve.forward import Forwarded, answers
from bitdistill_serve.ledger import LedgerOverHandle, ledger_application
from bitdistill_serve.options import ServeOptions
from bitdistill_serve.ray_metrics import RayMetrics
from bitdistill_serve.router import Router
from bitdistill_serve.service import Service

DEPLOYMENT, ROUTER = "decoder", "router"
BEYOND_ENGINE = 32  # requests that a replica takes beyond the engine's limit: refusals, /health, /v1/models
CONSTRUCTOR_TRIES = 2  # a model that cannot be read will not be read at the twentieth time either
ROUTED_AT_ONCE = 4096  # the replicas are what limits
STREAMS_A_ROUTER = 128  # that run at the same time: beyond that there is one router more


class Replica:
    """One engine; `rates` counts for all replicas.

    An error in its making is what `serve status` and `bitdistill serve` show.
    """

    def __init__(self, options: ServeOptions, rates: DeploymentHandle | None = None) -> None:
        self.service = Service.load(options, ledger=LedgerOverHandle(rates) if rates else None)
        self.service.start()  # Serve calls this on the event loop of the requests
        self._api = create_api(lambda: self.service)
        replica = serve.get_replica_context().replica_tag
        exported = RayMetrics(self.service.metrics.registry, self.service.engine.metrics, replica)
        self._exporting = asyncio.ensure_future(exported.run())

    async def forward(self, request: Forwarded) -> AsyncIterator[list[Message]]:
        """Answer what a router sends."""
        async for messages in answers(self._api, request):
            yield messages

    async def check_health(self) -> None:
        """Raises when the engine is beyond recovery; Serve then replaces the replica."""
        health = self.service.engine.health()
        if health.status is Status.FAILING:
            raise ServeError("engine", f"fails: {health.last_failure}", "It is restarted")

    async def __del__(self) -> None:
        """Serve's way to end a replica, after its requests."""
        if hasattr(self, "_exporting"):
            self._exporting.cancel()
        if hasattr(self, "service"):
            await self.service.stop()


def replica_service() -> Service:
    """The service of the replica that this process is."""
    replica: Replica = serve.get_replica_context().servable_object
    return replica.service


def replica_api() -> FastAPI:
    """The routes, made in the replica."""
    return create_api(replica_service)


def build(args: Mapping[str, Any]) -> Application:
    """The application of `args` (see `ServeOptions`), to be run by Serve."""
    models = ServeOptions.parse_several(args)
    if len(models) == 1 and models[0].max_replicas == 1:
        return _deployment(serve.ingress(replica_api)(Replica), DEPLOYMENT, models[0]).bind(models[0])
    rates = ledger_application() if any(options.keys for options in models) else None
    decoders = {
        options.served_name: _deployment(
            Replica, DEPLOYMENT if len(models) == 1 else f"{DEPLOYMENT}-{options.served_name}", options
        ).bind(options, rates)
        for options in models
    }
    return _router(models).bind({options.served_name: options for options in models}, decoders)


def _router(models: Sequence[ServeOptions]) -> Deployment:
    streams = sum(options.max_replicas * options.slots for options in models)
    return serve.deployment(
        serve.ingress()(Router),
        name=ROUTER,
        num_replicas=math.ceil(streams / STREAMS_A_ROUTER),
        max_ongoing_requests=ROUTED_AT_ONCE,
        graceful_shutdown_timeout_s=max(options.drain for options in models),
        ray_actor_options={"num_cpus": 0},
    )


def _deployment(replica: type, name: str, options: ServeOptions) -> Deployment:
    scales: dict[str, Any] = {"num_replicas": options.max_replicas}
    if options.min_replicas < options.max_replicas:
        scales = {
            "autoscaling_config": {
                "min_replicas": options.min_replicas,
                "max_replicas": options.max_replicas,
                "target_ongoing_requests": options.slots,
            }
        }
    return serve.deployment(
        replica,
        name=name,
        max_ongoing_requests=options.limit + BEYOND_ENGINE,
        max_constructor_retry_count=CONSTRUCTOR_TRIES,
        graceful_shutdown_timeout_s=options.drain,
        ray_actor_options={"num_cpus": options.threads or 1, "num_gpus": 1 if options.device == "cuda" else 0},
        **scales,
    )
