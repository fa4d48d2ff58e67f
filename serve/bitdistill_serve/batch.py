"""Who runs next: continuous batching over a `Decoder`, without threads or asyncio.

`Batch.advance` is one round:

1. waiting sequences take free slots; clients take turns (`waiting.py`).  One whose beginning another sequence of its
   request is about to read waits for that, and then takes it from the cache;
2. prompts are read: up to `prefill_tokens` of them in a round, fewer beside running sequences (`rhythm.py`), so that a
   long prompt delays each of their tokens a little, and none by all of itself.  The oldest gets half of a round at
   least, and the shortest ones what is left, so that short prompts do not wait for a long one;
3. every sequence whose prompt is read takes one step, all in one batch;
4. what ended frees its slot, which the next round fills.

A round that gave somebody a first token says so before the step, which the next call takes first.  What comes out are
tokens; whoever reads them makes text of them (`generation.Text`), and cancels what a stop string ended.

A prompt that the decoder refuses ends its own sequence only.  A decoder call that fails ends the sequences that took
part in it, and the others go on.  A sequence that waits or runs for longer than it may fails.

    B sequences of one call   V vocabulary
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import isfinite
from typing import Generic, TypeVar

import torch
from torch import Tensor

from bitdistill_ray.decode.base import Decoder
from bitdistill_ray.decode.logprobs import TokenLogprob, token_logprobs
from bitdistill_ray.decode.sampling import likeliest, sample
from bitdistill_ray.errors import BitdistillError, ServeError
from bitdistill_serve.errors import DeadlineError, GrammarError, QueueTimeoutError
from bitdistill_serve.generation import End, Generation, Growth, Job, K
from bitdistill_serve.rhythm import Rhythm
from bitdistill_serve.waiting import Waiting

logger = logging.getLogger(__name__)

READ_TOKENS = 128  # prompt tokens scored in one call, whose logits [t, V] are held
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Seconds that a generation may wait for a slot, and that it may take in all."""

    queue_s: float = 60.0
    total_s: float = 600.0


class Batch(Generic[K]):
    """The sequences of one decoder, each known by the key that its owner gave it.  One thread calls it.

    `failures` counts the decoder calls that failed since a sequence last came to a good end.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        stop_ids: frozenset[int],
        prefill_tokens: int,
        deadlines: Deadlines = Deadlines(),  # frozen
    ) -> None:
        self._decoder = decoder
        self._stop_ids, self._prefill_tokens, self._deadlines = stop_ids, prefill_tokens, deadlines
        self._waiting: Waiting[Job[K]] = Waiting()
        self._running: list[Job[K]] = []  # those with a slot, in the order in which they got it
        self._grown: list[tuple[K, Growth]] = []
        self._step_due = False  # the last call told of first tokens, and left the step
        self.failures = 0
        self._rhythm = Rhythm()
        self.last_failure: str | None = None
        self._failure: BitdistillError | None = None  # of the attempt that failed last

    @property
    def idle(self) -> bool:
        """True when `advance` has nothing to do or to tell."""
        return not (self._waiting or self._running or self._grown)

    @property
    def running(self) -> int:
        """Sequences with a slot."""
        return len(self._running)

    @property
    def only_steps(self) -> bool:
        """True when the next call will read no prompt, so that it takes no longer than a step."""
        return not len(self._waiting) and all(job.tokens for job in self._running)

    @property
    def tokens_held(self) -> int:
        """Tokens of running sequences in the cache."""
        return sum(self._decoder.length(job.slot) for job in list(self._running))

    def add(self, key: K, generation: Generation, client: str = "") -> None:
        """Queue a generation of `client`; what it grows by comes out of `advance` under `key`."""
        begin = partial(Job, key, generation, client=client, arrived_s=time.monotonic())
        job = self._attempt([], begin)
        if job is not None:
            self._waiting.add(job)
        else:
            self._grown.append((key, Growth(end=End.FAILED, error=self._failure)))

    def cancel(self, key: K) -> None:
        """End a sequence, whatever it is doing, and free its slot now; nothing happens when it has ended."""
        for job in [*self._waiting, *self._running]:
            if job.key == key:
                self._end(job, Growth(end=End.CANCELLED))

    def advance(self) -> list[tuple[K, Growth]]:
        """One round, or a part of it; returns what sequences grew by since the last call."""
        if not self._step_due:
            self._expire()
            if not self.only_steps:
                self._admit()
                self._prefill()
        first = not self._step_due and any(growth.tokens for _, growth in self._grown)
        if not first:
            self._step()
        self._step_due = first
        grown, self._grown = self._grown, []
        return grown

    def _expire(self) -> None:
        now_s, limits = time.monotonic(), self._deadlines
        for job in self._waiting if len(self._waiting) else ():
            if now_s - job.arrived_s > limits.queue_s:
                late = QueueTimeoutError("request", f"waited {limits.queue_s:g} s for a slot", "Send it again later")
                self._end(job, Growth(end=End.FAILED, error=late))
        for job in list(self._running):
            if now_s - job.arrived_s > limits.total_s:
                over = DeadlineError("request", f"took longer than {limits.total_s:g} s", "Ask for fewer tokens")
                self._end(job, Growth(end=End.FAILED, error=over))

    def _admit(self) -> None:
        if not (len(self._waiting) and self._decoder.free_slots):
            return
        for job in self._waiting:
            if not self._decoder.free_slots:
                return
            if self._beginning_is_being_read(job.generation):
                continue
            try:
                slot = self._decoder.admit(job.generation.prompt, reuse=job.generation.reusable)
            except BitdistillError as error:
                self._end(job, Growth(end=End.FAILED, error=error))
            else:
                self._waiting.serve(job)
                job.slot, job.cached = slot, self._decoder.length(slot)
                self._running.append(job)

    def _beginning_is_being_read(self, wanted: Generation) -> bool:
        common = wanted.prompt[: min(wanted.common, wanted.reusable)]
        return len(common) > 0 and any(
            self._decoder.length(s.slot) < len(common) and s.generation.prompt[: len(common)] == common
            for s in self._running
        )

    def _prefill(self) -> None:
        """Read a chunk of the oldest prompt, and equal chunks of the shortest others while they fit in the round."""
        unread = [(pending, s) for s in self._running if (pending := self._decoder.pending(s.slot))]
        if not unread:
            return
        (oldest, first), *others = unread
        room = self._prefill_tokens
        if any(job.tokens for job in self._running):
            room = self._rhythm.tokens_beside_a_step(room)
        chunk = oldest if oldest <= room else max(1, room // 2) if others else room
        room, group = room - chunk, [first]
        for pending, job in sorted(others, key=lambda of: of[0]):
            room -= min(pending, chunk)
            if room < 0:
                break
            group.append(job)
        plain = [s for s in group if s.generation.score_from is None]
        if plain:
            tokens, began_s = sum(min(chunk, self._decoder.pending(s.slot)) for s in plain), time.perf_counter()
            logits = self._attempt(plain, lambda: self._decoder.prefill([s.slot for s in plain], chunk)) or []
            self._rhythm.read(tokens, time.perf_counter() - began_s)
            read = [(s, logits_V) for s, logits_V in zip(plain, logits, strict=False) if logits_V is not None]
            if read:
                self._extend([s for s, _ in read], torch.stack([logits_V for _, logits_V in read]))
        for job in group:
            if job.generation.score_from is not None:
                self._attempt([job], partial(self._score, job, job.generation.score_from, chunk))

    def _score(self, job: Job[K], score_from: int, chunk: int) -> None:
        """Read a chunk of a prompt whose tokens are to be told from `score_from` on."""
        slot, asked = job.slot, job.generation
        begin = self._decoder.length(slot)
        if begin < score_from - 1:
            self._decoder.prefill([slot], min(chunk, score_from - 1 - begin))
            return
        logits_TV = self._decoder.read(slot, min(chunk, READ_TOKENS))
        following = asked.prompt[begin + 1 : begin + 1 + len(logits_TV)]
        if not self._finite(logits_TV):
            self._end(job, self._not_finite())
            return
        scored = tuple(token_logprobs(logits_TV[: len(following)], following, asked.logprobs or 0))
        done = not self._decoder.pending(slot) and not asked.writes
        growth = Growth(scored=scored, cached=job.tell_cached(), end=End.LENGTH if done else None)
        if done:
            self._end(job, growth)
            return
        self._grown.append((job.key, growth))
        if not self._decoder.pending(slot):
            self._extend([job], logits_TV[-1:])

    def _step(self) -> None:
        group = [s for s in self._running if s.tokens]
        if group:
            last, began_s = [s.tokens[-1] for s in group], time.perf_counter()
            logits_BV = self._attempt(group, lambda: self._decoder.step([s.slot for s in group], last))
            self._rhythm.stepped(time.perf_counter() - began_s)
            if logits_BV is not None:
                self._extend(group, logits_BV)

    def _extend(self, group: Sequence[Job[K]], logits_BV: Tensor) -> None:
        """Choose one token for each sequence, and end those that it ends and those whose logits are no numbers."""
        best, peaks = likeliest(logits_BV)
        tokens: list[int | None] = [*best]
        self._draw(group, logits_BV, tokens)
        told = self._told(group, logits_BV, tokens)
        for i, (job, token) in enumerate(zip(group, tokens, strict=True)):
            if token is None:
                continue
            growth = self._attempt([job], partial(self._grow, job, token, told.get(i, ()), peaks[i]))
            if growth is None:
                continue
            if growth.end is None:
                self._grown.append((job.key, growth))
            else:
                self._end(job, growth)

    def _grow(self, job: Job[K], token: int, told: tuple[TokenLogprob, ...], peak: float) -> Growth:
        if not isfinite(peak):
            return self._not_finite()
        full = self._decoder.length(job.slot) >= self._decoder.slot_tokens
        return job.grow(token, told, stop_ids=self._stop_ids, full=full)

    def _draw(self, group: Sequence[Job[K]], logits_BV: Tensor, tokens: list[int | None]) -> None:
        """Replace the tokens of those whose next is not simply the likeliest; None where its call failed."""
        rows, histories = [], []
        for i, job in enumerate(group):
            if not job.plain:
                tokens[i] = None
                history = self._attempt([job], job.history)
                if history is not None:
                    rows.append(i)
                    histories.append(history)
        if rows:
            drawn = self._attempt([group[i] for i in rows], lambda: sample(logits_BV[rows], histories))
            for i, token in zip(rows, drawn or (), strict=drawn is not None):
                tokens[i] = token

    def _told(
        self, group: Sequence[Job[K]], logits_BV: Tensor, tokens: Sequence[int | None]
    ) -> dict[int, tuple[TokenLogprob, ...]]:
        """The log-probabilities of those that tell them, by row."""
        rows = [(i, token) for i, token in enumerate(tokens)
                if group[i].generation.logprobs is not None and token is not None]  # fmt: skip
        if not rows:
            return {}
        asked = {i: group[i].generation.logprobs or 0 for i, _ in rows}
        every = token_logprobs(logits_BV[list(asked)], [token for _, token in rows], max(asked.values()))
        return {i: (of.cut(most),) for (i, most), of in zip(asked.items(), every, strict=True)}

    @staticmethod
    def _finite(logits: Tensor) -> bool:
        return bool(logits.amax(dim=-1).isfinite().all())

    @staticmethod
    def _not_finite() -> Growth:
        error = ServeError("model", "its logits are not finite", "Check the model with `bitdistill evaluate`")
        return Growth(end=End.FAILED, error=error)

    def _end(self, job: Job[K], last: Growth) -> None:
        self._grown.append((job.key, last))
        if last.end in (End.STOP, End.LENGTH):
            self.failures = 0
        if job.slot < 0:
            self._waiting.remove(job)
        else:
            self._running.remove(job)
            self._decoder.free(job.slot)

    def _attempt(self, group: Sequence[Job[K]], call: Callable[[], T]) -> T | None:
        """What `call` returns; whatever it raises ends the sequences that took part in it, and the result is None."""
        try:
            return call()
        except GrammarError as error:
            self._failure = error
        except Exception as error:
            logger.exception("a call for %d sequences failed", len(group))
            self.failures += 1
            self.last_failure = what = f"{type(error).__name__}: {error}"
            self._failure = ServeError("decoder", what, "Send the request again; the server's log has the cause")
        for job in group:
            self._end(job, Growth(end=End.FAILED, error=self._failure))
        return None
