"""One measured number with its interval and the protocol without which it means nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

RESAMPLES = 1000
GAP = "_gap"  # behind a metric's name


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
    rows: dict[str, np.ndarray] = field(default_factory=dict)
    """Values of single rows, by the metric that is their mean."""
    predictions: dict[str, np.ndarray] = field(default_factory=dict)
    """The label predicted for each row, by the task's name."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, without the rows."""
        return {key: value for key, value in asdict(self).items() if key not in ("rows", "predictions")}

    def add_rows(self, name: str, values_W: np.ndarray, protocol: str) -> None:
        """A metric that is the mean over rows; they are kept, to be compared with another model's."""
        self.metrics[name], self.rows[name] = bootstrap(values_W, protocol), values_W

    def add_gaps(self, other: ModelReport) -> None:
        """Two models on the same rows: `METRIC_gap:TASK`, this one less the other, of each metric whose rows both have,
        and `agreement:TASK`, the share of rows for which both predict the same label."""
        for name, values_W in self.rows.items():
            if name in other.rows:
                metric, _, task = name.partition(":")
                said = f"less {other.name}, on the same {len(values_W)} rows; paired bootstrap"
                self.metrics[f"{metric}{GAP}:{task}"] = bootstrap(values_W - other.rows[name], said)
        for task, labels_W in self.predictions.items():
            if task in other.predictions:
                same_W = (labels_W == other.predictions[task]).astype(float)
                said = f"labels predicted as {other.name} does, of {len(same_W)} rows"
                self.metrics[f"agreement:{task}"] = bootstrap(same_W, said)


def bootstrap(
    values_W: np.ndarray, protocol: str, transform: Callable[[np.ndarray], np.ndarray] = np.asarray
) -> Metric:
    """The mean of `values_W` (one per window or row, equal weights), transformed, with its percentile interval."""
    draws = np.random.default_rng(0).integers(0, len(values_W), (RESAMPLES, len(values_W)))
    means = transform(values_W[draws].mean(axis=1))
    low, high = np.percentile(means, (2.5, 97.5))
    return Metric(float(transform(values_W.mean())), float(low), float(high), protocol)
