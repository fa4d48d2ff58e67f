"""The Ray Serve application: `serve run bitdistill_serve.app:build model=PATH [KEY=VALUE …]` (keys: `options.py`).

One deployment holds the engine and answers HTTP.  Ray Serve lets more requests in than the engine takes, so that it is
the engine that refuses, at once and with a Retry-After it can estimate; requests beyond that wait in Serve's router,
where the next replica would take them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application

from bitdistill_ray.errors import ServeError
from bitdistill_serve.api import create_api
from bitdistill_serve.engine import Status
from bitdistill_serve.options import ServeOptions
from bitdistill_serve.service import Service

DEPLOYMENT = "decoder"
BEYOND_ENGINE = 32  # requests that a replica takes beyond the engine's limit: refusals, /health, /v1/models
CONSTRUCTOR_TRIES = 2  # a model that cannot be read will not be read at the twentieth time either
DRAIN_S = 30.0  # how long a replica that is to stop may finish its streams


class Replica:
    """One engine.  An error in its making is what `serve status` and `bitdistill serve` show."""

    def __init__(self, options: ServeOptions) -> None:
        self.service = Service.load(options)
        self.service.start()  # `serve.ingress` calls this on the event loop of the requests

    async def check_health(self) -> None:
        """Raises when the engine is beyond recovery; Serve then replaces the replica."""
        health = self.service.engine.health()
        if health.status is Status.FAILING:
            raise ServeError("engine", f"fails: {health.last_failure}", "It is restarted")

    async def __del__(self) -> None:
        """Serve's way to end a replica, after its requests."""
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
    options = ServeOptions.parse(args)
    deployment = serve.deployment(
        serve.ingress(replica_api)(Replica),
        name=DEPLOYMENT,
        max_ongoing_requests=options.slots + options.queue + BEYOND_ENGINE,
        max_constructor_retry_count=CONSTRUCTOR_TRIES,
        graceful_shutdown_timeout_s=DRAIN_S,
        ray_actor_options={"num_cpus": options.threads or 1, "num_gpus": 1 if options.device == "cuda" else 0},
    )
    return deployment.bind(options)
