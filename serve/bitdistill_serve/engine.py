"""The engine: owns a decoder and its loop, takes requests from asyncio and streams text back.

One thread runs `Batch.advance` in a loop and sleeps when there is nothing to do; blocking decoder calls never touch the
event loop.  A round costs one hop to the event loop at most, whatever the number of streams; there tokens become text,
while the thread is in its next step.  Steps of a few milliseconds share a hop (`event_ms`): what reads and writes HTTP
takes caches and memory from the decoder, so fewer and fuller events are faster for everybody.  A `Stream` keeps what
its consumer has not read yet and hands it over in one piece.

The queue is bounded: `submit` raises `QueueFullError` at once instead of letting latency grow, with the time at which
it is this client's turn.  Its last places are for clients that have none, so that one client never shuts another out.
Requests may be cancelled at any time; their slots are free before the next round.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial

from bitdistill_ray.decode.base import Decoder
from bitdistill_ray.errors import ServeError
from bitdistill_serve.batch import Batch, Deadlines
from bitdistill_serve.detokenize import Tokenizer
from bitdistill_serve.errors import EngineStoppedError, QueueFullError
from bitdistill_serve.generation import End, Generation, Growth, Piece, Text
from bitdistill_serve.metrics import Metrics, Pace, resident_bytes
from bitdistill_serve.options import ServeOptions

logger = logging.getLogger(__name__)

UNHEALTHY_AFTER = 3  # decoder calls that failed and no request that ended well: one may be chance, three are not
NEWEST_WEIGHT = 0.1  # of the newest generation in the running mean of their times
LONGEST_RETRY_S = 60
MOST_TURNS = 4  # times all places; a client that asks again and again makes nobody wait for longer
NEWCOMERS = 8  # one place in so many of the queue is kept for clients that have nothing here


class Status(Enum):
    """`DEGRADED`: a decoder call failed, and nothing ended well since.  `FAILING`: several did, or the loop ended."""

    OK = "ok"
    DEGRADED = "degraded"
    FAILING = "failing"


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """The state of the engine now; `last_failure` also tells of a failure that is over."""

    status: Status
    running: int
    waiting: int
    slots: int
    queue: int
    memory_bytes: int | None
    last_failure: str | None


class Stream:
    """The pieces of the generations of one request, as (which generation, piece), for one consumer.

    Iterating ends when all generations have ended, and raises the error of the first one that failed.
    """

    def __init__(
        self, engine: Engine, generations: Sequence[Generation], client: str, tokenizer: Tokenizer, metrics: Metrics
    ) -> None:
        self.generations, self.client = tuple(generations), client
        self._engine = engine
        self._texts = [Text(generation, tokenizer) for generation in generations]
        self.live = set(range(len(generations)))  # not ended, as the engine told so far
        self.started_s = time.monotonic()
        self._pace = [Pace(metrics, self.started_s) for _ in generations]
        self._unread: dict[int, list[Piece]] = {}
        self._arrived = asyncio.Event()

    def __aiter__(self) -> AsyncIterator[tuple[int, Piece]]:
        return self

    async def __anext__(self) -> tuple[int, Piece]:
        while not self._unread:
            if not self.live:
                raise StopAsyncIteration
            self._arrived.clear()
            await self._arrived.wait()
        index = next(iter(self._unread))
        piece = Piece.joined(self._unread.pop(index))
        if piece.error is not None:
            raise piece.error
        return index, piece

    def cancel(self) -> None:
        """Stop what has not ended; may be called at any time, more than once too."""
        if self.live:
            self._engine.cancel(self)

    def put(self, index: int, growth: Growth) -> Piece | None:
        """The engine's side: one more piece, which is returned; None after the end that its text came to."""
        if index not in self.live:
            return None
        try:
            piece = self._texts[index].piece(growth)
        except Exception as error:  # whatever a tokenizer raises ends what it was for
            logger.exception("a token could not be made text")
            what = f"{type(error).__name__}: {error}"
            failed = ServeError("tokenizer", what, "Send the request again; the server's log has the cause")
            piece = Piece(end=End.FAILED, error=failed)
        self._unread.setdefault(index, []).append(piece)
        if piece.tokens:
            self._pace[index].grew(piece.tokens)
        if piece.end is not None:
            self.live.discard(index)
        self._arrived.set()
        return piece


class Engine:
    """Runs a `Batch` in a thread of its own.  All methods belong to the event loop on which `start` was called."""

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        options: ServeOptions,
        *,
        stop_ids: frozenset[int],
        metrics: Metrics,
    ) -> None:
        self._batch: Batch[tuple[Stream, int]] = Batch(
            decoder,
            stop_ids=stop_ids,
            prefill_tokens=options.prefill_tokens,
            deadlines=Deadlines(options.queue_s, options.timeout_s),
        )
        self._decoder, self._queue, self._concurrency = decoder, options.queue, options.concurrency
        self._tokenizer, self._hop_s = tokenizer, options.event_ms / 1e3
        self._metrics = metrics
        self._streams: set[Stream] = set()  # those with live generations
        self._live: Counter[str] = Counter()  # generations of each client, with and without a slot
        self._mean_s = 1.0  # of a generation, its wait included
        self._promised_s = 0.0  # when the last one who was refused was told to come back
        self._wake = threading.Condition()  # guards the two below
        self._commands: list[Callable[[], None]] = []  # for the thread, before its next round
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="decoder", daemon=True)
        self._died: str | None = None
        self._loop: asyncio.AbstractEventLoop

    @property
    def slot_tokens(self) -> int:
        """The longest sequence, prompt and answer together."""
        return self._decoder.slot_tokens

    @property
    def limit(self) -> int:
        """Generations that may run or wait at the same time."""
        return self._decoder.slots + self._queue

    def health(self) -> Health:
        """The state now."""
        failures = self._batch.failures
        if self._died or self._stopping or failures >= UNHEALTHY_AFTER:
            status = Status.FAILING
        else:
            status = Status.DEGRADED if failures else Status.OK
        return Health(
            status=status,
            running=self._batch.running,
            waiting=max(0, self._live.total() - self._batch.running),
            slots=self._decoder.slots,
            queue=self._queue,
            memory_bytes=resident_bytes(),
            last_failure=self._died or self._batch.last_failure,
        )

    def metrics(self) -> bytes:
        """The page of `/metrics`."""
        health = self.health()
        return self._metrics.text(
            {
                "running": health.running,
                "waiting": health.waiting,
                "slots": health.slots,
                "kv_tokens": self._batch.tokens_held,
                "kv_capacity_tokens": self._decoder.capacity,
                "memory_bytes": health.memory_bytes or 0,
            }
        )

    def start(self) -> None:
        """Start the thread; streams are delivered to the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """End the loop after its round; what still runs fails with an EngineStoppedError."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        await asyncio.to_thread(self._thread.join)

    def submit(self, generations: Sequence[Generation], *, client: str = "") -> Stream:
        """Queue all generations of a request, or none.

        Raises QueueFullError when they do not fit, and EngineStoppedError when the loop has ended.
        """
        if self._died or self._stopping:
            raise EngineStoppedError("engine", f"is not running ({self._died or 'it was stopped'})", "Try again later")
        new = len(generations)
        if refusal := self.refusal(client, new):
            raise refusal
        stream = Stream(self, generations, client, self._tokenizer, self._metrics)
        self._live[client] += new
        self._streams.add(stream)
        self._metrics.prompt_tokens.inc(sum(len(g.prompt) for g in generations))
        self._command(*(partial(self._batch.add, (stream, i), g, client) for i, g in enumerate(generations)))
        return stream

    def refusal(self, client: str, new: int = 1) -> QueueFullError | None:
        """The error of a client for whose `new` generations there is no place; asked early, it saves reading them."""
        total, own = self._live.total(), self._live[client]
        places = self.limit - (self._queue // NEWCOMERS if own else 0)
        if total + new > places:
            what = f"{total} of {self.limit} places are taken"
        elif self._concurrency is not None and own + new > self._concurrency:
            what = f"{own} of your {self._concurrency} places are taken"
        else:
            return None
        error = QueueFullError("engine", what, "Try again later")
        error.retry_after_s = self._turn()
        return error

    def _turn(self) -> int:
        """Whole seconds until a place may be free for one more who was refused.

        Those who were refused before come back first: each is told a time of its own, a place's time after the one
        before, so that they do not all come again at once to be refused once more.
        """
        now_s = time.monotonic()
        self._promised_s = max(self._promised_s, now_s) + self._mean_s / max(1, self._live.total())
        self._promised_s = min(self._promised_s, now_s + MOST_TURNS * self._mean_s, now_s + LONGEST_RETRY_S)
        return max(1, math.ceil(self._promised_s - now_s))

    def cancel(self, stream: Stream) -> None:
        """End what has not ended of a stream."""
        self._command(*(partial(self._batch.cancel, (stream, i)) for i in range(len(stream.generations))))

    def _command(self, *commands: Callable[[], None]) -> None:
        with self._wake:
            self._commands.extend(commands)
            self._wake.notify()

    def _run(self) -> None:
        """The thread."""
        error = EngineStoppedError("engine", "was stopped", "Send the request again")
        held: list[tuple[tuple[Stream, int], Growth]] = []
        hopped_s = 0.0
        try:
            while self._await_work():
                held += self._batch.advance()
                now_s = time.monotonic()
                late = now_s - hopped_s >= self._hop_s or not self._batch.only_steps
                if held and (late or any(growth.urgent for _, growth in held)):
                    self._loop.call_soon_threadsafe(self._deliver, held)
                    held, hopped_s = [], now_s
        except BaseException as bug:  # a panic of compiled code is no Exception, and clients wait all the same
            logger.exception("the decoding loop ended")
            self._died = f"{type(bug).__name__}: {bug}"
            error = EngineStoppedError("engine", f"has ended ({self._died})", "Send the request again")
        self._loop.call_soon_threadsafe(self._close, error)

    def _await_work(self) -> bool:
        """Sleep until there is something to do, and obey the commands; False when the loop is to end."""
        if not (self._commands or self._stopping or self._batch.idle):
            return True  # as in most rounds; a command that comes just now is obeyed before the next
        with self._wake:
            self._wake.wait_for(lambda: self._stopping or self._commands or not self._batch.idle)
            commands, self._commands = self._commands, []
        for command in commands:
            command()
        return not self._stopping

    def _deliver(self, grown: list[tuple[tuple[Stream, int], Growth]]) -> None:
        """On the event loop: hand pieces to their streams, and give up the places of generations that ended."""
        tokens = 0
        for (stream, index), growth in grown:
            piece = stream.put(index, growth)
            if piece is None:
                continue
            tokens += piece.tokens
            if piece.cached:
                self._metrics.cached_tokens.inc(piece.cached)
            if piece.end is not None:
                self._ended(stream, piece.end)
                if growth.end is None:  # the thread does not know: it was the text that ended
                    self._command(partial(self._batch.cancel, (stream, index)))
        if tokens:
            self._metrics.tokens.inc(tokens)
            self._metrics.batch.observe(tokens)

    def _ended(self, stream: Stream, end: End) -> None:
        self._metrics.ended(end.value)
        self._live[stream.client] -= 1
        if not self._live[stream.client]:
            del self._live[stream.client]
        if end in (End.STOP, End.LENGTH):
            self._mean_s += NEWEST_WEIGHT * (time.monotonic() - stream.started_s - self._mean_s)
        if not stream.live:
            self._streams.discard(stream)

    def _close(self, error: ServeError) -> None:
        """On the event loop, when the thread has ended: fail what it left."""
        for stream in list(self._streams):
            self._deliver([((stream, i), Growth(end=End.FAILED, error=error)) for i in tuple(stream.live)])
