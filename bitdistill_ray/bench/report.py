"""What a benchmark leaves: rows, each a measured value beside its limit and its baseline, as JSON and as a table.

A limit is measured in the same run, next to the value, so that a busy or throttled machine lowers both.

    share   the value against the limit: value / limit, and limit / value where lower is better; 1 is the limit
    ratio   the value against the baseline, so that above 1 is better than it
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from bitdistill_ray.errors import KernelError
from bitdistill_ray.evaluation.table import align
from bitdistill_ray.machine import commit, describe_machine, versions


class Unit(StrEnum):
    """What a value counts."""

    GB_S = "GB/s"
    GIB_S = "GiB/s"
    GOPS = "GOPS"  # 2 M N K / 1e9 / s
    TFLOP_S = "TFLOP/s"
    TOKENS_S = "tokens/s"
    MICROSECONDS = "us"
    MILLISECONDS = "ms"
    BYTES = "B"
    MIB = "MiB"
    PERCENT = "%"
    COUNT = "count"

    @property
    def lower_is_better(self) -> bool:
        """True for times, sizes and errors."""
        return self in (Unit.MICROSECONDS, Unit.MILLISECONDS, Unit.BYTES, Unit.MIB, Unit.PERCENT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measured value.  `shape` is [M, N, K]; `limit_is` and `baseline_is` say in words what was measured."""

    case: str
    metric: str
    unit: Unit
    value: float
    format: str | None = None
    shape: tuple[int, int, int] | None = None
    threads: int | None = None
    limit: float | None = None
    limit_is: str | None = None
    baseline: float | None = None
    baseline_is: str | None = None

    @property
    def share(self) -> float | None:
        """The value against the limit."""
        return self._against(self.limit)

    @property
    def ratio(self) -> float | None:
        """The value against the baseline."""
        return self._against(self.baseline)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {
            "case": self.case,
            "format": self.format,
            "shape": None if self.shape is None else list(self.shape),
            "threads": self.threads,
            "metric": self.metric,
            "unit": self.unit.value,
            "value": self.value,
            "limit": self.limit,
            "limit_is": self.limit_is,
            "baseline": self.baseline,
            "baseline_is": self.baseline_is,
            "share": self.share,
            "ratio": self.ratio,
        }

    def _against(self, other: float | None) -> float | None:
        if other is None:
            return None
        return other / self.value if self.unit.lower_is_better else self.value / other


def as_json(rows: Sequence[Row]) -> dict[str, Any]:
    """The whole file: which code, where, and the rows."""
    from bitdistill_kernels import instruction_sets

    kernels = None  # a checkout without the compiled library measures everything else
    with suppress(KernelError):
        kernels = instruction_sets()["chosen"]
    machine = {**describe_machine(), "kernels": kernels}
    return {"commit": commit(), "machine": machine, "versions": versions(), "rows": [row.to_dict() for row in rows]}


def table(rows: Sequence[Row]) -> str:
    """The rows for a person; below them, what each limit and baseline is."""
    head = ["case", "format", "M x N x K", "metric", "value", "limit", "share", "baseline", "ratio"]
    cells = [
        [
            row.case,
            row.format or "-",
            "-" if row.shape is None else " x ".join(map(str, row.shape)),
            row.metric,
            f"{_number(row.value)} {row.unit}",
            _number(row.limit),
            _number(row.share),
            _number(row.baseline),
            _number(row.ratio),
        ]
        for row in rows
    ]
    notes = [(row.metric, "limit", row.limit_is) for row in rows] + [
        (row.metric, "baseline", row.baseline_is) for row in rows
    ]
    said = dict.fromkeys(f"{what} of {metric}: {words}" for metric, what, words in notes if words)
    return "\n".join([align([head, *cells]), "", *said])


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"
