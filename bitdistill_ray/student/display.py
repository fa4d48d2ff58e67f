"""A Monitor's rows on the driver's terminal: a progress bar, or plain lines where the output is no terminal.

At most one line in `every_s` seconds, whatever the pace of the steps; what workers say comes above it, in full.
"""

from __future__ import annotations

import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TextIO

import ray
from ray.exceptions import GetTimeoutError
from tqdm import tqdm

from bitdistill_ray.student.headline import Row, Window, headline

ASK_TIMEOUT_S = 10.0


class ProgressBar:
    """Shows a Monitor's rows while the driver waits for the trainer, and what `look` finds to say meanwhile."""

    def __init__(
        self,
        monitor: Any,
        steps: int,
        title: str,
        *,
        workers: int = 1,
        every_s: float = 1.0,
        look: Callable[[], str | None] = lambda: None,
        stream: TextIO | None = None,
    ) -> None:
        self.monitor, self.every_s, self.look = monitor, every_s, look
        stream = stream or sys.stderr
        self.screen: Screen = BarScreen(steps, title, stream) if stream.isatty() else LineScreen(steps, title)
        self.window = Window(workers=workers)
        self.lines, self.next_step = 0, 0
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> ProgressBar:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self.thread.join()

    def _watch(self) -> None:
        last = False
        while not last:
            last = self.stopped.wait(self.every_s)
            try:
                lines, rows = ray.get(
                    [self.monitor.lines.remote(since=self.lines), self.monitor.own_rows.remote(since=self.next_step)],
                    timeout=ASK_TIMEOUT_S,
                )
            except GetTimeoutError:
                continue  # a monitor that is busy writing; the rows come with the next look
            waits = self.look()
            self.show(lines, rows)
            if waits:
                self.screen.say(waits)
        self.screen.close()

    def show(self, lines: list[str], rows: list[Row]) -> None:
        """Print what was said, then the newest of the new rows."""
        self.lines += len(lines)
        for line in lines:
            self.screen.say(line)
        for row in rows:
            self.window.add(row)
        pace = self.window.pace()
        if rows and pace is not None:
            self.next_step = rows[-1]["step"] + 1
            self.screen.row(rows[-1], self.window)


class Screen(ABC):
    """Where lines go."""

    def __init__(self, steps: int, title: str) -> None:
        self.steps, self.title = steps, title

    @abstractmethod
    def say(self, line: str) -> None:
        """A line that a worker said."""

    @abstractmethod
    def row(self, row: Row, window: Window) -> None:
        """The newest row."""

    def close(self) -> None:  # noqa: B027  (lines need no end)
        """The stage has ended."""


class LineScreen(Screen):
    """Whole lines on standard output, for logs and pipes."""

    def say(self, line: str) -> None:
        print(f"[{self.title}] {line}", flush=True)

    def row(self, row: Row, window: Window) -> None:
        pace = window.pace()
        assert pace is not None
        print(f"[{self.title}] {headline(row, pace, steps=self.steps)}", flush=True)


class BarScreen(Screen):
    """A bar on a terminal that redraws itself."""

    def __init__(self, steps: int, title: str, stream: TextIO) -> None:
        super().__init__(steps, title)
        self.bar = tqdm(
            total=steps, unit="step", file=stream, dynamic_ncols=True,
            bar_format=f"[{title}] {{n_fmt}}/{{total_fmt}} |{{bar:12}}| {{desc}}  {{elapsed}} < {{remaining}}",
        )  # fmt: skip

    def say(self, line: str) -> None:
        self.bar.write(f"[{self.title}] {line}")

    def row(self, row: Row, window: Window) -> None:
        pace = window.pace()
        assert pace is not None
        self.bar.set_description_str(headline(row, pace, steps=self.steps, place=False), refresh=False)
        self.bar.n = row["step"] + 1
        self.bar.refresh()

    def close(self) -> None:
        self.bar.close()
