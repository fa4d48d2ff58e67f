"""The figures of `/metrics` through Ray's metrics agents too: a page behind a load balancer is that of some replica,
an agent exports those of every replica on its node, apart by a tag.

Sums and counts go out as gauges of the same names (`ray_bitdistill_serve_generated_tokens_total`), which Prometheus'
`rate` reads like counters; the buckets of histograms stay with `/metrics`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from prometheus_client import CollectorRegistry
from ray.util.metrics import Gauge

EVERY_S = 5.0


class RayMetrics:
    """Copies the samples of a registry; `refresh` brings its gauges up to date first."""

    def __init__(self, registry: CollectorRegistry, refresh: Callable[[], object], replica: str) -> None:
        self._registry, self._refresh, self._replica = registry, refresh, replica
        self._gauges: dict[str, Gauge] = {}

    async def run(self) -> None:
        """Copy for ever."""
        while True:
            self.copy()
            await asyncio.sleep(EVERY_S)

    def copy(self) -> None:
        """Once."""
        self._refresh()
        for family in self._registry.collect():
            for sample in family.samples:
                if not sample.name.endswith(("_bucket", "_created")):
                    tags = {**sample.labels, "replica_id": self._replica}
                    self._gauge(sample.name, family.documentation, tuple(tags)).set(sample.value, tags=tags)

    def _gauge(self, name: str, says: str, tags: tuple[str, ...]) -> Gauge:
        if name not in self._gauges:
            self._gauges[name] = Gauge(name, description=says, tag_keys=tags)
        return self._gauges[name]
