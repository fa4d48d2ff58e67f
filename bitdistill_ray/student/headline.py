"""The one line that a person watches: the last rows of a stage, averaged over a moving window.

    12/500  loss 1.2346 (ce 0.9000, relation 0.3346)  12,346 tok/s  MFU 41.2 %  wait teacher 3 % data 0 %
    wire 0.84 GB/s  ETA 0:12:03

A step's time is its own `seconds` and the wait for its data before it.  Waits and bytes are those of the first worker;
its bytes are multiplied by the workers, whose shares are alike.  Pure: rows in, text out.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from bitdistill_ray.losses.chunked import RELATION
from bitdistill_ray.losses.objective import TermKind

Row = Mapping[str, Any]
PART = re.compile(rf"({'|'.join(re.escape(name) for name in (*TermKind, RELATION))})(@.*)?")
SPAN_S = 30.0
MIN_ROWS = 5


def loss_parts(row: Row) -> dict[str, float]:
    """The loss terms of a row by name, in its order."""
    return {name: float(value) for name, value in row.items() if PART.fullmatch(name) and value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """A window's averages.  Waits are shares of its time; `mfu` and `wire_bytes_per_s` are None where not known."""

    step_s: float
    tokens_per_s: float
    teacher_wait: float
    data_wait: float
    wire_bytes_per_s: float | None
    mfu: float | None


class Window:
    """The last rows: at least `MIN_ROWS`, and as many more as fit into `span_s` seconds of training."""

    def __init__(self, *, workers: int = 1, span_s: float = SPAN_S) -> None:
        self.workers, self.span_s = workers, span_s
        self.rows: deque[Row] = deque()

    def add(self, row: Row) -> None:
        """Take the next row; one whose step was seen before (after a restart) replaces it and what followed."""
        while self.rows and self.rows[-1]["step"] >= row["step"]:
            self.rows.pop()
        self.rows.append(row)
        while len(self.rows) > MIN_ROWS and sum(map(duration, self.rows)) - duration(self.rows[0]) >= self.span_s:
            self.rows.popleft()

    def pace(self) -> Pace | None:
        """Averages of the window; None while it is empty."""
        if not self.rows:
            return None
        total = max(sum(map(duration, self.rows)), 1e-9)
        wire = self._sum("teacher_bytes") * self.workers / total
        known = [row for row in self.rows if row.get("mfu") is not None]
        busy = sum(row["mfu"] * row["seconds"] for row in known)
        return Pace(
            step_s=total / len(self.rows),
            tokens_per_s=self._sum("tokens") / total,
            teacher_wait=self._sum("teacher_wait_s") / total,
            data_wait=self._sum("data_wait_s") / total,
            wire_bytes_per_s=wire or None,
            mfu=busy / total if known else None,
        )

    def _sum(self, key: str) -> float:
        return float(sum(row.get(key) or 0 for row in self.rows))


def duration(row: Row) -> float:
    """Seconds from one step to the next."""
    return float(row["seconds"]) + float(row.get("data_wait_s") or 0)


def headline(row: Row, pace: Pace, *, steps: int, place: bool = True) -> str:
    """The line for the newest `row`; without `place` a progress bar says the step and the time left."""
    parts = loss_parts(row)
    shown = ", ".join(f"{name} {value:.4f}" for name, value in parts.items()) if len(parts) > 1 else ""
    pieces = [f"{row['step'] + 1}/{steps}"] if place else []
    pieces += [f"loss {row['loss']:.4f}" + (f" ({shown})" if shown else ""), f"{pace.tokens_per_s:,.0f} tok/s"]
    if pace.mfu is not None:
        pieces.append(f"MFU {100 * pace.mfu:.1f} %")
    pieces.append(f"wait teacher {100 * pace.teacher_wait:.0f} % data {100 * pace.data_wait:.0f} %")
    if pace.wire_bytes_per_s is not None:
        pieces.append(f"wire {pace.wire_bytes_per_s / 1e9:.2f} GB/s")
    if place:
        left = round((steps - row["step"] - 1) * pace.step_s)
        pieces.append(f"ETA {timedelta(seconds=left)}")
    return "  ".join(pieces)
