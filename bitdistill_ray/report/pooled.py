"""Runs that differ in their seed alone, as one: the mean over seeds, and its gap to another on the very same rows.

Runs belong together whose names are the same before `-seedN`.  What a row scored is averaged over the seeds; intervals
are the central 95 % of a bootstrap over rows, for a gap over the rows' differences, so what both find hard cancels.
They say what other rows would have given; how far seeds lie apart stands beside them (least and most).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from bitdistill_ray.errors import ConfigError
from bitdistill_ray.evaluation.metric import Metric, bootstrap
from bitdistill_ray.report.axis import figure
from bitdistill_ray.report.gather import RunFacts

SEED = re.compile(r"-seed\d+$")
TRAINED, TEACHER = "trained", "teacher"  # as `evaluate` calls them
HEADS = ["runs", "seeds", "metric", "mean", "95 % of rows", "seeds from – to", "gap", "95 % of rows"]


@dataclass(slots=True)
class Group:
    """Runs of one name: each metric's rows, one array for every seed; of the student, else of the teacher (a run that
    only made one)."""

    seeds: int = 0
    rows: dict[str, list[np.ndarray]] = field(default_factory=dict)
    teacher: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def add(self, facts: RunFacts) -> None:
        """Count a run."""
        self.seeds += 1
        for metric, models in facts.row_scores.items():
            own = models.get(TRAINED, models[TEACHER])
            self.rows.setdefault(metric, []).append(np.array(own))
            self.teacher.setdefault(metric, []).append(np.array(models[TEACHER]))


def pooled(runs: Sequence[RunFacts], against: str | None = None) -> list[list[str]]:
    """The lines of the table under `HEADS`: one for each group and metric; none where no run kept rows.

    Gaps are to the group called `against`, without it to each run's own teacher.

    Raises:
        ConfigError: there is no such group, or it was measured on other rows.
    """
    groups: dict[str, Group] = {}
    for facts in runs:
        if facts.row_scores:
            groups.setdefault(SEED.sub("", facts.name), Group()).add(facts)
    if groups and against is not None and against not in groups:
        raise ConfigError("against", f"no run called {against!r} kept its rows", f"Name one of {', '.join(groups)}")
    lines = []
    for name, group in groups.items():
        for metric, seeds in group.rows.items():
            other = group.teacher.get(metric) if against is None else groups[against].rows.get(metric)
            lines.append([name, str(group.seeds), metric, *_cells(name, metric, seeds, other)])
    return lines


def _cells(name: str, metric: str, seeds: list[np.ndarray], other: list[np.ndarray] | None) -> list[str]:
    mean_W = np.mean(seeds, axis=0)
    values = sorted(float(values_W.mean()) for values_W in seeds)
    found = bootstrap(mean_W, "")
    cells = [figure(found.value), _interval(found), f"{figure(values[0])} – {figure(values[-1])}"]
    if other is None:
        return [*cells, "–", "–"]
    other_W = np.mean(other, axis=0)
    if other_W.shape != mean_W.shape:
        raise ConfigError(name, f"{metric} was measured on {len(mean_W)} rows, what it is compared with on "
                          f"{len(other_W)}", "Compare runs with the same `evaluate` stage")  # fmt: skip
    gap = bootstrap(mean_W - other_W, "")
    return [*cells, f"{gap.value:+.4f}", _interval(gap)]


def _interval(metric: Metric) -> str:
    return f"{metric.low:.4f} to {metric.high:.4f}"
