"""What a stage's remote part tells the person at the terminal: lines, and how far it has come.

Ray forwards all that its processes print, a library's chatter too, so the driver switches that off (it stays in Ray's
own log files) and shows instead what a stage says on purpose, through an actor that it asks once a second.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError
from tqdm import tqdm

from bitdistill_ray.board import Board

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Notes:
    """The task's end of a Board."""

    board: Any

    def begin(self) -> None:
        """Say that the task runs."""
        self.board.begin.remote()

    def say(self, line: str) -> None:
        """Print a line on the driver's terminal."""
        self.board.say.remote(line)

    def each(self, items: Iterable[Item], *, total: int) -> Iterator[Item]:
        """The items, of which there are `total`, with a progress bar on the driver's terminal."""
        self.board.expect.remote(total)
        for item in items:
            yield item
            self.board.advance.remote()


@contextmanager
def shown_notes(title: str) -> Iterator[Notes]:
    """Notes whose lines and progress appear on this process's terminal while the block runs."""
    board = ray.remote(Board).options(num_cpus=0).remote()
    over = threading.Event()
    thread = threading.Thread(target=_show, args=(board, title, over), daemon=True)
    thread.start()
    try:
        yield Notes(board)
    finally:
        over.set()
        thread.join()
        ray.kill(board)


def _show(board: Any, title: str, over: threading.Event) -> None:
    shown, bar = 0, None
    while True:
        last = over.wait(1.0)
        try:
            lines, done, total = ray.get(board.read.remote(shown))
        except RayError:  # what ended the board ends the stage too, which says so
            return
        shown += len(lines)
        for line in lines:
            tqdm.write(f"[{title}] {line}")
        if total and bar is None:
            bar = tqdm(total=total, desc=title)
        if bar is not None:
            bar.update(done - bar.n)
        if last:
            if bar is not None:
                bar.close()
            return
