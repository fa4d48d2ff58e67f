"""The newest figures as Prometheus metrics, exported by Ray's metrics agent on the node where the monitor runs.

    ray_bitdistill_train_loss{run="…", stage="distill"} 1.23          every figure of a row: a gauge
    ray_bitdistill_train_tokens_total{…} 12345                         tokens, retries, teacher_bytes: counters

Scrape every node's agent as Ray's documentation says (`prom_metrics_service_discovery.json`, which Ray writes).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ray.util.metrics import Counter, Gauge

from bitdistill_ray.tracking.base import figures

PREFIX = "bitdistill_train_"
COUNTED = ("tokens", "retries", "teacher_bytes")


class Prometheus:
    """Gauges and counters by a row's own names, with the tags `run` and `stage`."""

    name = "Prometheus"
    errors: tuple[type[Exception], ...] = (ValueError, RuntimeError)

    def __init__(self, run: str, stage: str) -> None:
        self.tags = {"run": run, "stage": stage}
        self.gauges: dict[str, Gauge] = {}
        self.counters: dict[str, Counter] = {}

    def step(self, row: Mapping[str, Any]) -> None:
        values = {"step": float(row["step"]), **figures(row)}
        for name, value in values.items():
            if name not in COUNTED:
                self._gauge(name).set(value, tags=self.tags)
            elif value > 0:
                self._counter(name).inc(value, tags=self.tags)

    def rewind(self, step: int) -> None:
        """A gauge shows the newest figure, and a counter what was done, repeated steps too."""

    def flush(self) -> None:
        """Ray exports by itself."""

    def close(self) -> None:
        """Ray forgets the metrics with the process."""

    def _gauge(self, name: str) -> Gauge:
        if name not in self.gauges:
            self.gauges[name] = Gauge(
                metric_name(name), description=f"{name} of the newest step", tag_keys=(*self.tags,)
            )
        return self.gauges[name]

    def _counter(self, name: str) -> Counter:
        if name not in self.counters:
            self.counters[name] = Counter(metric_name(name), description=f"{name} of all steps", tag_keys=(*self.tags,))
        return self.counters[name]


def metric_name(name: str) -> str:
    """A row's name in Prometheus' letters: `forward_kl@5` is `bitdistill_train_forward_kl_5`."""
    return PREFIX + re.sub(r"\W", "_", name)
