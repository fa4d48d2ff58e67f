"""What `/metrics` tells Prometheus about one served model.

Times are those of the event loop, which is where clients are answered: a token counts when it is handed to its stream.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

PREFIX = "bitdistill_serve_"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FIRST_TOKEN_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
TOKEN_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Counters and histograms of one model; a registry of its own, so that several can live in one process."""

    def __init__(self, model: str, kernels: Mapping[str, str]) -> None:
        """`kernels` says what computes: its path and instruction set."""
        self.registry = CollectorRegistry()
        self._labels = {"model": model}
        self.requests = self._counter("requests", "HTTP requests answered", "route", "status")
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts").labels(**self._labels)
        self.cached_tokens = self._counter("cached_tokens", "Of those, already in the cache").labels(**self._labels)
        self.tokens = self._counter("generated_tokens", "Tokens generated").labels(**self._labels)
        self.tool_calls = self._counter("tool_calls", "Calls of tools in answers").labels(**self._labels)
        self.ends = self._counter("generations", "Generations ended", "end")
        self.first_token = self._histogram("time_to_first_token_seconds", "From arrival", FIRST_TOKEN_S)
        self.token = self._histogram("time_per_token_seconds", "Between tokens of a stream", TOKEN_S)
        self.batch = self._histogram("batch_size", "Sequences that grew in a round", BATCHES)
        self._gauges = {
            name: Gauge(PREFIX + name, says, ["model"], registry=self.registry).labels(**self._labels)
            for name, says in (
                ("running", "Sequences with a slot"),
                ("waiting", "Generations in the queue"),
                ("slots", "Sequences that can run at a time"),
                ("kv_tokens", "Tokens of running sequences in the cache"),
                ("kv_capacity_tokens", "Tokens that the cache holds"),
                ("memory_bytes", "Memory of the process, shared pages of the model's file included"),
            )
        }
        info = Gauge(PREFIX + "kernel_info", "What computes", ["model", *kernels], registry=self.registry)
        info.labels(**self._labels, **kernels).set(1)

    def answered(self, route: str, status: int) -> None:
        """One HTTP request more."""
        self.requests.labels(**self._labels, route=route, status=str(status)).inc()

    def ended(self, end: str) -> None:
        """One generation more has ended."""
        self.ends.labels(**self._labels, end=end).inc()

    def text(self, gauges: Mapping[str, float]) -> bytes:
        """The page, with the state of this moment."""
        for name, value in gauges.items():
            self._gauges[name].set(value)
        return bytes(generate_latest(self.registry))

    def _counter(self, name: str, says: str, *labels: str) -> Any:
        return Counter(PREFIX + name, says, ["model", *labels], registry=self.registry)

    def _histogram(self, name: str, says: str, buckets: tuple[float, ...]) -> Any:
        histogram = Histogram(PREFIX + name, says, ["model"], registry=self.registry, buckets=buckets)
        return histogram.labels(**self._labels)


class RouterMetrics:
    """What a router knows beside the pages of its models."""

    def __init__(self, models: Iterable[str]) -> None:
        self._registry = CollectorRegistry()
        self._resent = Counter(PREFIX + "resent", "Requests sent again, for a replica died before it had said anything",
                               ["model"], registry=self._registry)  # fmt: skip
        for model in models:
            self._resent.labels(model=model)

    def resent(self, model: str) -> None:
        """One more."""
        self._resent.labels(model=model).inc()

    def text(self) -> bytes:
        """The page."""
        return bytes(generate_latest(self._registry))


def resident_bytes() -> int | None:
    """Memory that this process has now, where the system tells."""
    with suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    return None


def merged(pages: Iterable[bytes]) -> bytes:
    """Pages of several models as one: what is told of a metric once, and the samples of all behind it."""
    families: dict[str, list[str]] = {}
    for page in pages:
        family: list[str] = []
        for line in page.decode().splitlines():
            if line.startswith("# HELP "):
                family = families.setdefault(line.split()[2], [])
            if not line.startswith("#") or line not in family:
                family.append(line)
    return "".join(f"{line}\n" for family in families.values() for line in family).encode()


class Pace:
    """When the tokens of one generation came."""

    __slots__ = ("_last_s", "_metrics")

    def __init__(self, metrics: Metrics, arrived_s: float) -> None:
        self._metrics, self._last_s = metrics, -arrived_s  # negative: no token yet

    def grew(self, tokens: int) -> None:
        """`tokens` more, now."""
        now_s = time.monotonic()
        if self._last_s < 0:
            self._metrics.first_token.observe(now_s + self._last_s)
        else:
            self._metrics.token.observe((now_s - self._last_s) / tokens)
        self._last_s = now_s
