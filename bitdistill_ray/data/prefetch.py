"""Work on the next items of an iterator while the last one is in use: one thread, a bounded number ahead.

The items wait as futures, so that what the iterator raises reaches whoever asks for the item, in its place.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """The items of an endless generator, at most `depth` of them made ahead."""

    def __init__(self, items: Generator[T, None, None], depth: int) -> None:
        self._items = items
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._ahead: deque[Future[T]] = deque(self._thread.submit(next, items) for _ in range(depth + 1))

    def get(self) -> T:
        """The next item; what the generator raised instead of it is raised here, now and in every later call."""
        item = self._ahead[0].result()
        self._ahead.popleft()
        self._ahead.append(self._thread.submit(next, self._items))
        return item

    def close(self) -> None:
        """Stop working ahead and close the generator, in its thread and after the item under way."""
        for future in self._ahead:
            future.cancel()
        self._thread.submit(self._items.close)
        self._thread.shutdown(wait=False)
