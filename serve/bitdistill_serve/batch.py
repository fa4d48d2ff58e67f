"""Who runs next: continuous batching over a `Decoder`, without threads or asyncio.

`Batch.advance` is one round:

1. waiting sequences take free slots; clients take turns (`waiting.py`).  One whose beginning another sequence of its
   request is about to read waits for that, and then takes it from the cache;
2. prompts are read: up to `prefill_tokens` of them in a round, fewer beside running sequences (`rhythm.py`), so that a
   long prompt delays each of their tokens a little, and none by all of itself.  The oldest gets half of a round at
   least, and the shortest ones what is left, so that short prompts do not wait for a long one;
3. every sequence whose prompt is read takes one step, all in one batch;
4. what ended frees its slot, which the next round fills.

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
from typing import Generic, TypeVar

import torch
from torch import Tensor

from bitdistill_ray.decode.base import Decoder
from bitdistill_ray.decode.logprobs import TokenLogprob, token_logprobs
from bitdistill_ray.decode.sampling import sample
from bitdistill_ray.errors import BitdistillError, ServeError
from bitdistill_serve.detokenize import Tokenizer
from bitdistill_serve.errors import DeadlineError, GrammarError, QueueTimeoutError
from bitdistill_serve.generation import End, Generation, Job, K, Piece
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

    `failures` counts the decoder calls that failed since a sequence last came to a good end; `tokens_held` are those of
    running sequences in the cache.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        *,
        stop_ids: frozenset[int],
        prefill_tokens: int,
        deadlines: Deadlines = Deadlines(),  # frozen
    ) -> None:
        self._decoder, self._tokenizer = decoder, tokenizer
        self._stop_ids, self._prefill_tokens, self._deadlines = stop_ids, prefill_tokens, deadlines
        self._waiting: Waiting[Job[K]] = Waiting()
        self._running: list[Job[K]] = []  # those with a slot, in the order in which they got it
        self._pieces: list[tuple[K, Piece]] = []
        self.failures = self.tokens_held = 0
        self._rhythm = Rhythm()
        self.last_failure: str | None = None
        self._failure: BitdistillError | None = None  # of the attempt that failed last

    @property
    def idle(self) -> bool:
        """True when `advance` has nothing to do or to tell."""
        return not (self._waiting or self._running or self._pieces)

    @property
    def running(self) -> int:
        """Sequences with a slot."""
        return len(self._running)

    def add(self, key: K, generation: Generation, client: str = "") -> None:
        """Queue a generation of `client`; its pieces come out of `advance` under `key`."""
        begin = partial(Job, key, generation, self._tokenizer, client=client, arrived_s=time.monotonic())
        job = self._attempt([], begin)
        if job is not None:
            self._waiting.add(job)
        else:
            self._pieces.append((key, Piece(end=End.FAILED, error=self._failure)))

    def cancel(self, key: K) -> None:
        """End a sequence, whatever it is doing, and free its slot now; nothing happens when it has ended."""
        for job in [*self._waiting, *self._running]:
            if job.key == key:
                self._end(job, Piece(end=End.CANCELLED))

    def advance(self) -> list[tuple[K, Piece]]:
        """One round; returns what sequences grew by since the last one."""
        self._expire()
        self._admit()
        self._prefill()
        self._step()
        self.tokens_held = sum(self._decoder.length(s.slot) for s in self._running)
        pieces, self._pieces = self._pieces, []
        return pieces

    def _expire(self) -> None:
        now_s, limits = time.monotonic(), self._deadlines
        for job in self._waiting if len(self._waiting) else ():
            if now_s - job.arrived_s > limits.queue_s:
                late = QueueTimeoutError("request", f"waited {limits.queue_s:g} s for a slot", "Send it again later")
                self._end(job, Piece(end=End.FAILED, error=late))
        for job in list(self._running):
            if now_s - job.arrived_s > limits.total_s:
                over = DeadlineError("request", f"took longer than {limits.total_s:g} s", "Ask for fewer tokens")
                self._end(job, Piece(end=End.FAILED, error=over))

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
                self._end(job, Piece(end=End.FAILED, error=error))
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
        piece = Piece(scored=scored, cached=job.tell_cached(), end=End.LENGTH if done else None)
        if done:
            self._end(job, piece)
            return
        self._pieces.append((job.key, piece))
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
        """Sample one token for each sequence, and end those that it ends and those whose logits are no numbers."""
        histories = [self._attempt([job], job.history) for job in group]
        if None in histories:  # a grammar failed, and its sequence has ended
            rows = [i for i, history in enumerate(histories) if history is not None]
            group, logits_BV = [group[i] for i in rows], logits_BV[rows]
        alive = [history for history in histories if history is not None]
        if not alive:
            return
        finite_B = logits_BV.amax(dim=-1).isfinite().tolist()
        tokens = self._attempt(group, lambda: sample(logits_BV, alive)) or []
        told = self._told(group, logits_BV, tokens)
        for job, token, finite in zip(group, tokens, finite_B, strict=False):
            grow = partial(self._grow, job, token, told.get(job.slot, ()))
            piece = self._attempt([job], grow) if finite else self._not_finite()
            if piece is None:
                continue
            if piece.end is None:
                self._pieces.append((job.key, piece))
            else:
                self._end(job, piece)

    def _told(
        self, group: Sequence[Job[K]], logits_BV: Tensor, tokens: Sequence[int]
    ) -> dict[int, tuple[TokenLogprob, ...]]:
        """The log-probabilities of those that tell them, by slot."""
        rows = [i for i, s in enumerate(group) if s.generation.logprobs is not None] if tokens else []
        if not rows:
            return {}
        most = max(group[i].generation.logprobs or 0 for i in rows)
        every = token_logprobs(logits_BV[rows], [tokens[i] for i in rows], most)
        return {group[i].slot: (of.cut(group[i].generation.logprobs or 0),) for i, of in zip(rows, every, strict=True)}

    def _grow(self, job: Job[K], token: int, told: tuple[TokenLogprob, ...]) -> Piece:
        full = self._decoder.length(job.slot) >= self._decoder.slot_tokens
        return job.grow(token, told, stop_ids=self._stop_ids, full=full)

    @staticmethod
    def _finite(logits: Tensor) -> bool:
        return bool(logits.amax(dim=-1).isfinite().all())

    @staticmethod
    def _not_finite() -> Piece:
        error = ServeError("model", "its logits are not finite", "Check the model with `bitdistill evaluate`")
        return Piece(end=End.FAILED, error=error)

    def _end(self, job: Job[K], last: Piece) -> None:
        self._pieces.append((job.key, last))
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
            self._end(job, Piece(end=End.FAILED, error=self._failure))
        return None
