"""The feeder: one place that hands the ranks their share of every optimizer step.

The global batch of step s is the next `sequences_per_step` sequences of the stream, whatever the number of ranks; a
rank asks for its share of a step, as often as it likes and in any order within the last `keep_steps` steps, so a
retried or late request gets the same answer.  Steps are made ahead in a thread.  `state(step)` is the ledger after that
step, to be saved with the weights of that step; a feeder made with it goes on exactly there.

A plain class, so that it also runs inside a process; `start_feeder` wraps it as a Ray actor.  An actor that dies is
restarted where its ledger was when it was made, and reads forward to the step that is asked for: slow, but the same.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

from bitdistill_ray.data.batch import BatchArrays, share, stack
from bitdistill_ray.data.blocks import Block, UnitTask
from bitdistill_ray.data.dataset import RayReading, divide, free_cpus, read_here, read_on_ray
from bitdistill_ray.data.documents import Counts
from bitdistill_ray.data.encoder import Encoder
from bitdistill_ray.data.ledger import Ledger, corpus_fingerprint
from bitdistill_ray.data.mixture import Mixture, Part, parts_of
from bitdistill_ray.data.prefetch import Prefetcher
from bitdistill_ray.data.sources import CorpusSpec
from bitdistill_ray.data.stream import Stream
from bitdistill_ray.data.units import list_units
from bitdistill_ray.errors import ConfigError, DataError


@dataclass(frozen=True, slots=True)
class Step:
    """The global batch of one optimizer step, and the ledger after it."""

    arrays: BatchArrays
    after: Ledger


class Feeder:
    """Hands out the batches of a corpus, step by step.

    corpus              what decides the sequences and their order
    sequences_per_step  sequences of one optimizer step, over all ranks and micro-batches
    ledger              `state(step)` of an earlier run, to go on after it; None: from the start
    reading             how to read on the Ray cluster; None: in this process
    prefetch_steps      steps made ahead
    keep_steps          steps that can be asked for again; ranks may be so far apart

    Making one touches nothing; `open`, or the first request, lists the corpus and may raise.
    """

    def __init__(
        self,
        corpus: CorpusSpec,
        *,
        sequences_per_step: int,
        ledger: Mapping[str, Any] | None = None,
        reading: RayReading | None = None,
        prefetch_steps: int = 2,
        keep_steps: int = 32,
    ) -> None:
        for key, value in (("sequences_per_step", sequences_per_step), ("keep_steps", keep_steps)):
            if value < 1:
                raise ConfigError(f"data.{key}", f"{value}", "Give at least 1")
        self.corpus, self.sequences_per_step = corpus, sequences_per_step
        self.prefetch_steps, self.keep_steps = prefetch_steps, keep_steps
        self._reading = reading
        self._resume_from = ledger
        self._mixture: Mixture | None = None
        self._steps: Prefetcher[Step] | None = None
        self._kept: dict[int, Step] = {}
        self._lock = threading.RLock()

    def open(self) -> dict[str, Any]:
        """List the corpus, check the ledger and begin to read; returns the ledger as it stands.

        Raises DataError (nothing to read, or the corpus changed since the ledger was written), StorageError and
        ModelError (the tokenizer).  Calling it again does nothing.
        """
        with self._lock:
            if self._mixture is None:
                encoder = self.corpus.encoder()
                self.corpus = replace(self.corpus, tokenizer=encoder)  # the readers get this one
                units = list_units(self.corpus)
                fingerprint = corpus_fingerprint(self.corpus, units, encoder)
                start = Ledger(corpus=fingerprint)
                if self._resume_from is not None:
                    start = Ledger.from_dict(self._resume_from)
                    start.check(fingerprint)
                self._mixture = _mixture(self.corpus, parts_of(self.corpus, units), encoder, self._reading)
                self._start = self._last = start
                self._steps = Prefetcher(self._make_steps(start), self.prefetch_steps)
            return self._last.to_dict()

    def resume(self, ledger: Mapping[str, Any]) -> dict[str, Any]:
        """Go on after `ledger` instead, and forget the steps handed out; raises what `open` raises."""
        with self._lock:
            self.close()
            self._resume_from = ledger
            return self.open()

    def batch(self, step: int, *, rank: int = 0, ranks: int = 1, micro: int = 0, micros: int = 1) -> BatchArrays:
        """The share of a rank, or of one of its micro-batches, in the global batch of `step`.

        Raises ConfigError if the step does not divide among `ranks * micros`, DataError for a step no longer kept,
        and what reading raises.
        """
        parts = ranks * micros
        if self.sequences_per_step % parts:
            raise ConfigError("sequences_per_step", f"{self.sequences_per_step} sequences do not divide among "
                              f"{ranks} ranks with {micros} micro-batches", "Use a multiple")  # fmt: skip
        if not (0 <= rank < ranks and 0 <= micro < micros):
            raise ConfigError("rank", f"rank {rank} of {ranks}, micro-batch {micro} of {micros}", "Count from 0")
        return share(self._step(step).arrays, rank * micros + micro, parts)

    def state(self, step: int) -> dict[str, Any]:
        """The ledger after `step`, as JSON; that of the step before the first one is the ledger it began with."""
        with self._lock:
            self.open()
            after = self._start if step == self._start.step - 1 else self._step(step).after
            return after.to_dict()

    def sequences(self, step: int) -> dict[str, Any]:
        """Which sequences `step` consumes, in so few words that they fit into its row of metrics.

        Its first and last sequence id, how many sequences that makes since the beginning, and the start of the rolling
        digest over all their ids: equal digests mean equal sequences in equal order, in this step and all before it.
        """
        with self._lock:
            made = self._step(step)
            ids = made.arrays["sequence_ids"]
            return {"first_sequence": str(ids[0]), "last_sequence": str(ids[-1]), "sequences": made.after.position,
                    "sequence_digest": made.after.digest[:16]}  # fmt: skip

    def counts(self) -> dict[str, int]:
        """What happened to documents (used, empty, cut, and so on) in the units read so far of the pass begun in."""
        if self._mixture is None:
            return {}
        total = Counts()
        for stream in self._mixture.streams.values():
            total.add(stream.counts.to_array())
        return asdict(total)

    def close(self) -> None:
        """Stop reading; another request opens it again where it began."""
        with self._lock:
            if self._steps is not None:
                self._steps.close()
            self._steps, self._mixture, self._kept = None, None, {}

    def _step(self, step: int) -> Step:
        with self._lock:
            self.open()
            assert self._steps is not None
            if step < self._last.step and step not in self._kept:
                raise DataError(f"step {step}", f"no longer kept; the feeder is at step {self._last.step}",
                                "Raise keep_steps, or resume from the checkpoint before it")  # fmt: skip
            while step not in self._kept:
                made = self._steps.get()
                self._kept[self._last.step] = made
                self._last = made.after
                self._kept.pop(self._last.step - 1 - self.keep_steps, None)
            return self._kept[step]

    def _make_steps(self, ledger: Ledger) -> Generator[Step, None, None]:
        assert self._mixture is not None
        sequences = self._mixture.sequences(ledger.position, ledger.cursors)
        while True:
            chosen = list(islice(sequences, self.sequences_per_step))
            cursors = {**ledger.cursors, **{name: sequence.after for name, sequence in chosen}}
            ledger = ledger.advance((sequence.id for _, sequence in chosen), cursors)
            yield Step(stack([sequence for _, sequence in chosen]), ledger)


def _mixture(corpus: CorpusSpec, parts: Sequence[Part], encoder: Encoder, reading: RayReading | None) -> Mixture:
    shares = [part.share for part in parts]
    readings = [None] * len(parts) if reading is None else divide(reading, shares, free=free_cpus())
    streams = {
        part.name: Stream(part.corpus, part.units, partial(_read, corpus=part.corpus, encoder=encoder, reading=one))
        for part, one in zip(parts, readings, strict=True)
    }
    return Mixture(streams, shares, seed=corpus.seed)


def _read(
    tasks: Iterator[UnitTask], *, corpus: CorpusSpec, encoder: Encoder, reading: RayReading | None
) -> Iterator[Block]:
    if reading is None:
        return read_here(tasks, corpus, encoder)
    return read_on_ray(tasks, corpus, encoder, reading)


def start_feeder(corpus: CorpusSpec, **options: Any) -> Any:
    """A `Feeder` as a Ray actor (its handle); `options` are those of Feeder, `reading` defaulting to all of Ray.

    It takes no CPU of its own account, is restarted when it dies, and ends with its owner.
    """
    import ray

    options.setdefault("reading", RayReading())
    actor = ray.remote(Feeder).options(num_cpus=0, max_restarts=-1, max_task_retries=-1)
    return actor.remote(corpus, **options)
