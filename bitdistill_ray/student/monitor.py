"""What a run looks like from outside: one row for each optimiser step, in `metrics.jsonl` and on the terminal.

`Monitor` is an actor that the driver owns, so that rows survive a student that dies.  A student that resumes from a
checkpoint first takes back the rows that it is about to repeat.
"""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import ray
from tqdm import tqdm

from bitdistill_ray.errors import BitdistillError
from bitdistill_ray.storage import Storage

Row = dict[str, Any]
FILE = "metrics.jsonl"


class Monitor:
    """Collects the rows of one training stage; rows of earlier stages in the file are kept."""

    def __init__(self, storage: Storage, stage: str, *, flush_every_s: float = 5.0) -> None:
        self.storage, self.stage, self.flush_every_s = storage, stage, flush_every_s
        lines = storage.read_bytes(FILE).decode().splitlines() if storage.exists(FILE) else []
        self.rows: list[Row] = [json.loads(line) for line in lines]
        self.flushed_at = 0.0
        self.refused: BitdistillError | None = None
        self.said: list[str] = []

    def step(self, row: Row) -> None:
        """Add the row of one optimiser step."""
        self.rows.append({"stage": self.stage, **row})
        if time.monotonic() - self.flushed_at > self.flush_every_s:
            self.flush()

    def say(self, line: str) -> None:
        """Add a line for the driver's terminal."""
        self.said.append(line)

    def lines(self, since: int = 0) -> list[str]:
        """What was said, from line `since` on."""
        return self.said[since:]

    def rewind(self, step: int) -> None:
        """Forget this stage's rows from `step` on: they are about to be repeated."""
        self.rows = [r for r in self.rows if r["stage"] != self.stage or r["step"] < step]

    def own_rows(self, since: int = 0) -> list[Row]:
        """This stage's rows from step `since` on."""
        return [r for r in self.rows if r["stage"] == self.stage and r["step"] >= since]

    def flush(self) -> None:
        """Write the file."""
        self.storage.write_bytes(FILE, "".join(json.dumps(r) + "\n" for r in self.rows).encode())
        self.flushed_at = time.monotonic()

    def refuse(self, error: BitdistillError) -> None:
        """Remember an error that a restart cannot mend; the next attempt stops at once."""
        self.refused = error

    def refusal(self) -> BitdistillError | None:
        """The error that `refuse` was given."""
        return self.refused


class ProgressBar:
    """Shows a Monitor's rows on the terminal while the driver waits for the trainer."""

    def __init__(self, monitor: Any, steps: int, title: str) -> None:
        self.monitor, self.steps, self.title = monitor, steps, title
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> ProgressBar:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self.thread.join()

    def _watch(self) -> None:
        shown = 0
        with tqdm(total=self.steps, desc=self.title, unit="step", mininterval=1.0) as bar:
            while True:
                last = self.stopped.wait(1.0)
                lines = ray.get(self.monitor.lines.remote(since=shown))
                shown += len(lines)
                for line in lines:
                    bar.write(f"[{self.title}] {line}")
                rows = ray.get(self.monitor.own_rows.remote(since=bar.n))
                if rows:
                    bar.set_postfix_str(headline(rows[-1]), refresh=False)
                    bar.update(rows[-1]["step"] + 1 - bar.n)
                if last:
                    return


def headline(row: Row) -> str:
    """The figures of one row that a person watches."""
    waits = f"wait teacher {row['teacher_wait_s']:.2f}s data {row['data_wait_s']:.2f}s"
    return f"loss {row['loss']:.4f}, {row['tokens_per_s']:,.0f} tok/s, {waits}"
