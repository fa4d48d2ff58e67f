"""The student's side of the cache: storage is asked first, the live teacher about the rest, and its answers are kept.

A question is looked up by a thread of its own, which waits for the batch, reads blocks and decodes them while the
student computes; nothing but that thread touches the store.  A batch of which any sequence is unknown goes to the
teacher as a whole, since teachers neither merge nor split requests.

What the teacher says passes through the same coder as what is read, so the losses of a run that fills the cache are,
bit for bit, those of the runs that read it.  A cache that cannot be written costs its entries, not the run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.exceptions import RayError

from bitdistill_ray.cache.entry import Entry, entries_of, keys_of, message_of
from bitdistill_ray.cache.store import CacheStore
from bitdistill_ray.cache.topk import TopKCoder
from bitdistill_ray.config import StorageConfig, TeacherConfig
from bitdistill_ray.core import Payload, TeacherSignals
from bitdistill_ray.data.batch import BatchArrays
from bitdistill_ray.errors import StorageError
from bitdistill_ray.model.identity import ModelIdentity
from bitdistill_ray.ray_errors import user_error
from bitdistill_ray.runs import storage_opener
from bitdistill_ray.teacher import wire
from bitdistill_ray.teacher.client import TeacherClient, Ticket
from bitdistill_ray.teacher.landing import Landing

FORMAT = 1  # of records and blocks: another one is another space
MIB = 2**20


@dataclass(slots=True)
class CacheTicket:
    """One question: what is found in storage, and, where that is not all of it, the teacher's ticket."""

    batch: Any
    found: Future[wire.Message | None]
    live: Ticket | None = None
    landing: Landing | None = None


class CachedTeacher:
    """`TeacherClient` with a memory: the same `ask`, `answer` and `take_counters`, and `finish` at the end.

    The counters are the client's, with `cache_hits` and `cache_misses` in sequences.
    """

    def __init__(
        self,
        client: TeacherClient,
        store: CacheStore,
        coder: TopKCoder | None,
        *,
        block_sequences: int,
        timeout_s: float,
        say: Callable[[str], object] = print,
    ) -> None:
        self.client, self.store, self.coder, self.say = client, store, coder, say
        self.block_sequences, self.timeout_s = block_sequences, timeout_s
        self.pending: dict[str, Entry] = {}
        self.hits = self.misses = 0
        self._open: deque[CacheTicket] = deque()
        self._thread = ThreadPoolExecutor(1, "teacher-cache")

    def ask(self, batch: Any) -> CacheTicket:
        """Look `batch` (BatchArrays, or a reference to some) up; returns at once."""
        ticket = CacheTicket(batch, self._thread.submit(self._look_up, batch))
        self._open.append(ticket)
        self._pass_on()
        return ticket

    def answer(self, ticket: CacheTicket, arrays: BatchArrays, device: torch.device | str = "cpu") -> TeacherSignals:
        """What storage or, failing that, a teacher says about `arrays`, which is `ticket`'s batch.

        Raises:
            TeacherError: as `TeacherClient.answer`.
            StorageError: the store refuses to be read, or takes more than `timeout_s`.
        """
        try:
            found = ticket.found.result(self.timeout_s)
        except FutureTimeoutError:
            raise StorageError(self.store.storage.url, f"the teacher cache was not read in {self.timeout_s:.0f} s",
                               "Check the store, or set teacher.cache.folder=null") from None  # fmt: skip
        except RayError as error:
            raise user_error(error) or error from None
        self._pass_on()
        self._open.remove(ticket)
        if found is not None:
            self.hits += len(arrays["ids"])
            return (ticket.landing or _land(found, arrays, device)).take()
        self.misses += len(arrays["ids"])
        assert ticket.live is not None  # _pass_on saw to it
        message = wire.encode_signals(self.client.answer(ticket.live, arrays))
        entries = entries_of(message, self.coder)
        self._keep(dict(zip(keys_of(arrays), entries, strict=True)))
        return Landing(message_of(entries, self.coder, message["sequence_ids"]), torch.device(device)).take()

    def take_up(self, ticket: CacheTicket, device: torch.device | str = "cpu") -> None:
        """Begin to copy what storage says to `device` if it is read and decoded already."""
        done = ticket.landing is None and ticket.found.done() and not ticket.found.exception()
        found = ticket.found.result() if done else None
        if found is not None:
            ticket.landing = _land(found, _arrays(ticket.batch), device)

    def take_counters(self) -> dict[str, float]:
        """Counters since the last call."""
        counters = {**self.client.take_counters(), "cache_hits": self.hits, "cache_misses": self.misses}
        self.hits = self.misses = 0
        return counters

    def finish(self) -> None:
        """Write what is not written yet, and wait until it is."""
        self._flush()
        self._thread.shutdown(wait=True)

    def _pass_on(self) -> None:
        """Ask the teacher about every open question that storage could not answer, in order."""
        for ticket in self._open:
            if (
                ticket.live is None
                and ticket.found.done()
                and not ticket.found.exception()
                and not ticket.found.result()
            ):
                ticket.live = self.client.ask(ticket.batch)

    def _look_up(self, batch: Any) -> wire.Message | None:
        arrays = _arrays(batch)
        entries = [self.pending.get(key) or self.store.get(key) for key in keys_of(arrays)]
        known = [entry for entry in entries if entry is not None]
        if len(known) < len(entries):
            return None
        return message_of(known, self.coder, tuple(arrays["sequence_ids"].tolist()))

    def _keep(self, entries: dict[str, Entry]) -> None:
        self.pending.update(entries)
        if len(self.pending) >= self.block_sequences:
            self._flush()

    def _flush(self) -> None:
        entries, self.pending = self.pending, {}
        self._thread.submit(self._write, entries)

    def _write(self, entries: dict[str, Entry]) -> None:
        new = {key: entry for key, entry in entries.items() if key not in self.store}
        try:
            self.store.put(new)
        except StorageError as error:
            self.say(f"teacher cache: {len(new)} sequences were not written, the run goes on without them: {error}")


def _arrays(batch: Any) -> BatchArrays:
    arrays: BatchArrays = ray.get(batch) if isinstance(batch, ray.ObjectRef) else batch
    return arrays


def _land(found: wire.Message, arrays: BatchArrays, device: torch.device | str) -> Landing:
    wire.check_answer({**found, "digest": wire.batch_digest(arrays)}, arrays)
    return Landing(found, torch.device(device))


def open_cache(
    client: TeacherClient,
    teacher: TeacherConfig,
    storage: StorageConfig,
    identity: ModelIdentity,
    *,
    say: Callable[[str], object] = print,
) -> CachedTeacher:
    """`client` behind the cache that `teacher.cache` describes.  Raises StorageError."""
    options, request = teacher.cache, client.request
    assert options.folder is not None
    coder = None
    if request.payload is Payload.TOPK:
        coder = TopKCoder(coding=options.coding, vocabulary=identity.vocab_size, entries=request.topk)
    about = {
        "format": FORMAT,
        "teacher": {name: value for name, value in identity.to_dict().items() if name != "name"},
        "payload": str(request.payload),
        "entries": {Payload.TOPK: request.topk, Payload.SAMPLED: request.samples}.get(request.payload),
        "coding": str(options.coding) if coder else None,
        "attention_layer": request.attention_layer,
    }
    if request.states_layers:
        about["states_layers"] = list(request.states_layers)
    folder = storage_opener(storage)(options.folder)
    store = CacheStore(folder, about, memory_bytes=options.memory_mib * MIB, say=say)
    store.open()
    return CachedTeacher(
        client, store, coder, block_sequences=options.block_sequences, timeout_s=teacher.timeout_s, say=say
    )
