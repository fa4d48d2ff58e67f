"""One measured number with its interval and the protocol without which it means nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

RESAMPLES = 1000


@dataclass(frozen=True, slots=True)
class Metric:
    """`low` and `high` bound the central 95 % of a bootstrap over windows or rows."""

    value: float
    low: float
    high: float
    protocol: str


@dataclass(slots=True)
class ModelReport:
    """One row of `bitdistill evaluate --json`."""

    name: str
    bits_per_weight: float
    bytes: int
    bytes_without_embeddings: int
    metrics: dict[str, Metric] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return asdict(self)


def bootstrap(
    values_W: np.ndarray, protocol: str, transform: Callable[[np.ndarray], np.ndarray] = np.asarray
) -> Metric:
    """The mean of `values_W` (one per window or row, equal weights), transformed, with its percentile interval."""
    draws = np.random.default_rng(0).integers(0, len(values_W), (RESAMPLES, len(values_W)))
    means = transform(values_W[draws].mean(axis=1))
    low, high = np.percentile(means, (2.5, 97.5))
    return Metric(float(transform(values_W.mean())), float(low), float(high), protocol)
