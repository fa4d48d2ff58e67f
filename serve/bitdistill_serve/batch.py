"""Who runs next: continuous batching over a `Decoder`, without threads or asyncio.

`Batch.advance` is one round:

1. waiting sequences take free slots, first come first served;
2. prompts are read: about `prefill_tokens` of them in a round, the oldest first, so that a long prompt delays running
   sequences by one chunk for each of their tokens, and not by all of itself;
3. every sequence whose prompt is read takes one step, all in one batch;
4. what ended frees its slot, which the next round fills.

A prompt that the decoder refuses ends its own sequence only.  A decoder call that fails ends the sequences that took
part in it, and the others go on.

    B sequences of one call   V vocabulary
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import Generic, TypeVar

import torch
from torch import Tensor

from bitdistill_ray.decode.base import Decoder
from bitdistill_ray.decode.sampling import History, Sampling, sample
from bitdistill_ray.errors import BitdistillError, ServeError
from bitdistill_serve.detokenize import Detokenizer, StopMatcher, Tokenizer

logger = logging.getLogger(__name__)

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


class End(Enum):
    """Why a sequence ended."""

    STOP = "stop"  # a stop token, or a stop string
    LENGTH = "length"  # max_tokens, or the slot is full
    CANCELLED = "cancelled"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What is asked for: continue `prompt`, up to any of `stops`."""

    prompt: tuple[int, ...]
    sampling: Sampling
    stops: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """What one sequence grew by: text (perhaps none) and tokens; its end, and the error of a failure, in the last."""

    text: str
    tokens: int
    end: End | None = None
    error: BitdistillError | None = None


@dataclass(slots=True, eq=False)
class _Sequence(Generic[K]):
    """A generation between `Batch.add` and its end.  `slot` is -1 while it waits."""

    key: K
    generation: Generation
    detokenizer: Detokenizer
    stops: StopMatcher
    slot: int = -1
    tokens: list[int] = field(default_factory=list)

    @property
    def history(self) -> History:
        return History(self.generation.sampling, self.generation.prompt, self.tokens)


class Batch(Generic[K]):
    """The sequences of one decoder, each known by the key that its owner gave it.  One thread calls it.

    `failures` counts the decoder calls that failed since a sequence last came to a good end.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        *,
        stop_ids: frozenset[int],
        prefill_tokens: int,
    ) -> None:
        self._decoder, self._tokenizer = decoder, tokenizer
        self._stop_ids, self._prefill_tokens = stop_ids, prefill_tokens
        self._waiting: deque[_Sequence[K]] = deque()
        self._running: list[_Sequence[K]] = []  # those with a slot, in the order in which they got it
        self._pieces: list[tuple[K, Piece]] = []
        self.failures = 0
        self.last_failure: str | None = None

    @property
    def idle(self) -> bool:
        """True when `advance` has nothing to do or to tell."""
        return not (self._waiting or self._running or self._pieces)

    @property
    def running(self) -> int:
        """Sequences with a slot."""
        return len(self._running)

    def add(self, key: K, generation: Generation) -> None:
        """Queue a generation; its pieces come out of `advance` under `key`."""
        detokenizer = Detokenizer(self._tokenizer, generation.prompt)
        self._waiting.append(_Sequence(key, generation, detokenizer, StopMatcher(generation.stops)))

    def cancel(self, key: K) -> None:
        """End a sequence, whatever it is doing, and free its slot now; nothing happens when it has ended."""
        for sequence in [*self._waiting, *self._running]:
            if sequence.key == key:
                self._end(sequence, Piece("", 0, End.CANCELLED))

    def advance(self) -> list[tuple[K, Piece]]:
        """One round; returns what sequences grew by since the last one."""
        self._admit()
        self._prefill()
        self._step()
        pieces, self._pieces = self._pieces, []
        return pieces

    def _admit(self) -> None:
        while self._waiting and self._decoder.free_slots:
            sequence = self._waiting[0]
            try:
                sequence.slot = self._decoder.admit(sequence.generation.prompt)
            except BitdistillError as error:
                self._end(sequence, Piece("", 0, End.FAILED, error))
            else:
                self._running.append(self._waiting.popleft())

    def _prefill(self) -> None:
        """Read a chunk of the oldest prompt, and equal chunks of the next ones while they fit in the round."""
        unread = [(s, pending) for s in self._running if (pending := self._decoder.pending(s.slot))]
        if not unread:
            return
        chunk = min(unread[0][1], self._prefill_tokens)
        room, group = self._prefill_tokens, []
        for sequence, pending in unread:
            room -= min(pending, chunk)
            if room < 0:
                break
            group.append(sequence)
        logits = self._attempt(group, lambda: self._decoder.prefill([s.slot for s in group], chunk)) or []
        read = [(s, logits_V) for s, logits_V in zip(group, logits, strict=False) if logits_V is not None]
        if read:
            self._extend([s for s, _ in read], torch.stack([logits_V for _, logits_V in read]))

    def _step(self) -> None:
        group = [s for s in self._running if s.tokens]
        if group:
            last = [s.tokens[-1] for s in group]
            logits_BV = self._attempt(group, lambda: self._decoder.step([s.slot for s in group], last))
            if logits_BV is not None:
                self._extend(group, logits_BV)

    def _extend(self, group: Sequence[_Sequence[K]], logits_BV: Tensor) -> None:
        """Sample one token for each sequence, and end those that it ends and those whose logits are no numbers."""
        finite_B = logits_BV.amax(dim=-1).isfinite().tolist()
        tokens = self._attempt(group, lambda: sample(logits_BV, [s.history for s in group]))
        for sequence, token, finite in zip(group, tokens or [], finite_B, strict=False):
            piece = self._attempt([sequence], partial(self._grow, sequence, token)) if finite else self._not_finite()
            if piece is None:
                continue
            if piece.end is None:
                self._pieces.append((sequence.key, piece))
            else:
                self._end(sequence, piece)

    @staticmethod
    def _not_finite() -> Piece:
        error = ServeError("model", "its logits are not finite", "Check the model with `bitdistill evaluate`")
        return Piece("", 0, End.FAILED, error)

    def _grow(self, sequence: _Sequence[K], token: int) -> Piece:
        """Append a token; the piece has an end if this is the last."""
        sequence.tokens.append(token)
        full = self._decoder.length(sequence.slot) >= self._decoder.slot_tokens
        end = End.LENGTH if full or len(sequence.tokens) >= sequence.generation.sampling.max_tokens else None
        if token in self._stop_ids:
            end, text = End.STOP, ""
        else:
            text = sequence.stops.push(sequence.detokenizer.push(token))
        if end is not None and not sequence.stops.stopped:
            text += sequence.stops.push(sequence.detokenizer.finish()) + sequence.stops.finish()
        return Piece(text, 1, End.STOP if sequence.stops.stopped else end)

    def _end(self, sequence: _Sequence[K], last: Piece) -> None:
        self._pieces.append((sequence.key, last))
        if last.end in (End.STOP, End.LENGTH):
            self.failures = 0
        if sequence.slot < 0:
            self._waiting.remove(sequence)
        else:
            self._running.remove(sequence)
            self._decoder.free(sequence.slot)

    def _attempt(self, group: Sequence[_Sequence[K]], call: Callable[[], T]) -> T | None:
        """What `call` returns; whatever it raises ends the sequences that took part in it, and the result is None."""
        try:
            return call()
        except Exception as error:
            logger.exception("a call for %d sequences failed", len(group))
            self.failures += 1
            self.last_failure = f"{type(error).__name__}: {error}"
            failure = ServeError("decoder", self.last_failure, "Send the request again; the server's log has the cause")
        for sequence in group:
            self._end(sequence, Piece("", 0, End.FAILED, failure))
        return None
