"""The queue: clients take turns, and within one client first come first served, so that many requests of one delay
another by one request only."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar


class Waiter(Protocol):
    """What waits, and for whom."""

    @property
    def client(self) -> str: ...


W = TypeVar("W", bound=Waiter)


class Waiting(Generic[W]):
    """Those that wait, iterated in the order in which they are to be served."""

    def __init__(self) -> None:
        self._of: dict[str, deque[W]] = {}  # the client whose turn it is comes first

    def __len__(self) -> int:
        return sum(map(len, self._of.values()))

    def __iter__(self) -> Iterator[W]:
        """A snapshot: the first of each client, then the second of each."""
        queues = [list(queue) for queue in self._of.values()]
        return iter([queue[turn] for turn in range(max(map(len, queues), default=0)) for queue in queues
                     if turn < len(queue)])  # fmt: skip

    def add(self, waiter: W) -> None:
        """Last among those of its client."""
        self._of.setdefault(waiter.client, deque()).append(waiter)

    def remove(self, waiter: W) -> None:
        """It waits no more, and was not served."""
        queue = self._of[waiter.client]
        queue.remove(waiter)
        if not queue:
            del self._of[waiter.client]

    def serve(self, waiter: W) -> None:
        """It waits no more; its client's next turn comes after everybody's."""
        self.remove(waiter)
        if queue := self._of.pop(waiter.client, None):
            self._of[waiter.client] = queue
