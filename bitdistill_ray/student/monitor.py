"""What a run looks like from outside: one row for each optimiser step, in `metrics.jsonl`
(and on the terminal: `display.py`).

`Monitor` is an actor that the driver owns, so that rows survive a student that dies.  A student that resumes from a
checkpoint first takes back the rows that it is about to repeat.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from bitdistill_ray.errors import BitdistillError
from bitdistill_ray.monitor_config import MonitorConfig
from bitdistill_ray.storage import Storage
from bitdistill_ray.student.job import Lesson
from bitdistill_ray.tracking.base import Tracker
from bitdistill_ray.tracking.start import start_trackers

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
        self.given: Lesson | None = None
        self.stopping = False
        self.trainer: Any = None
        self.said: list[str] = []
        self.trackers: list[Tracker] = []

    def track(self, config: MonitorConfig) -> None:
        """Tell the configured trackers every row from here on.

        Raises:
            ConfigError: one of them cannot be reached.
        """
        self.trackers = start_trackers(config, self.storage, self.stage)

    def step(self, row: Row) -> bool:
        """Add the row of one optimiser step; whether the run is to stop."""
        self.rows.append({"stage": self.stage, **row})
        self._tell(lambda tracker: tracker.step(row))
        if time.monotonic() - self.flushed_at > self.flush_every_s:
            self.flush()
        return self.stopping

    def stop(self) -> None:
        """The driver was told to go: whoever hands in the next row shall save and end."""
        self.stopping = True

    def is_stopping(self) -> bool:
        """Whether `stop` was called."""
        return self.stopping

    def controlled_by(self, controller: Any) -> None:
        """Ray Train's controller runs."""
        self.trainer = controller

    def controller(self) -> Any:
        """What `controlled_by` was given, None before."""
        return self.trainer

    def say(self, line: str) -> None:
        """Add a line for the driver's terminal."""
        self.said.append(line)

    def lines(self, since: int = 0) -> list[str]:
        """What was said, from line `since` on."""
        return self.said[since:]

    def rewind(self, step: int) -> None:
        """Forget this stage's rows from `step` on: they are about to be repeated."""
        self.rows = [r for r in self.rows if r["stage"] != self.stage or r["step"] < step]
        self._tell(lambda tracker: tracker.rewind(step))

    def own_rows(self, since: int = 0) -> list[Row]:
        """This stage's rows from step `since` on."""
        return [r for r in self.rows if r["stage"] == self.stage and r["step"] >= since]

    def flush(self) -> None:
        """Write the file; trackers hand over what they collected."""
        self.storage.write_bytes(FILE, "".join(json.dumps(r) + "\n" for r in self.rows).encode())
        self.flushed_at = time.monotonic()
        self._tell(lambda tracker: tracker.flush())

    def finish(self) -> None:
        """The stage has ended: `flush`, and the trackers close."""
        self.flush()
        self._tell(lambda tracker: tracker.close())

    def _tell(self, act: Callable[[Tracker], object]) -> None:
        """Every tracker; one whose service fails is left out with a word, since training must not depend on it."""
        for tracker in list(self.trackers):
            try:
                act(tracker)
            except tracker.errors as error:
                self.trackers.remove(tracker)
                self.say(f"{tracker.name} failed ({error}): it is told nothing more of this stage")

    def teach(self, lesson: Lesson) -> None:
        """The teachers are there."""
        self.given = lesson

    def lesson(self) -> Lesson | None:
        """What the students are told, None until the teachers are there.

        Raises:
            BitdistillError: they will not come.
        """
        if self.refused is not None:
            raise self.refused
        return self.given

    def refuse(self, error: BitdistillError) -> bool:
        """Remember an error that a restart cannot mend; whether it is the first."""
        first = self.refused is None
        self.refused = self.refused or error
        return first

    def refusal(self) -> BitdistillError | None:
        """The error that `refuse` was given."""
        return self.refused
