"""Which sequence lives in which slot of a decoder's cache, and what of the cache another sequence may take over.

A slot that was freed keeps its tokens until it is given away.  A prompt that begins as they do takes such a slot over
where most of it serves, and else a copy of the common part, also from a slot that still runs: copying a token costs a
few kilobytes of memory traffic, computing it a pass over the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from bitdistill_ray.decode.base import CapacityError
from bitdistill_ray.errors import ModelError

Copy = Callable[[int, int, int], None]
"""copy(slot, other, tokens): write the first tokens of one slot's cache over those of another."""


@dataclass(slots=True)
class _Sequence:
    """The state of one slot: its tokens, of which `prompt` are to be read, and how many of them the cache holds."""

    tokens: list[int] = field(default_factory=list)
    prompt: int = 0
    length: int = 0
    live: bool = False
    freed: int = 0  # when, in calls of `free`

    def shared(self, ids: Sequence[int]) -> int:
        """How many tokens of the cache are the first ones of `ids`."""
        held = self.tokens[: self.length]
        most = min(len(held), len(ids))
        return next((i for i, (own, other) in enumerate(zip(held, ids, strict=False)) if own != other), most)


class SlotBook:
    """The slots of one cache, and the promises of `Decoder` about them."""

    def __init__(
        self,
        slots: int,
        slot_tokens: int,
        vocab_size: int,
        copy: Copy,
        *,
        order: Callable[[], Sequence[int]] | None = None,
    ) -> None:
        """`order`: the slots as they are best given away, first one first; by default by number."""
        self.slot_tokens, self.vocab_size, self._copy = slot_tokens, vocab_size, copy
        self._order = order or (lambda: range(slots))
        self._sequences = [_Sequence() for _ in range(slots)]
        self._freed = 0

    @property
    def slots(self) -> int:
        return len(self._sequences)

    @property
    def free_slots(self) -> int:
        return sum(not sequence.live for sequence in self._sequences)

    def admit(self, ids: Sequence[int], reuse: int) -> int:
        """See `Decoder.admit`."""
        if not ids:
            raise ModelError("prompt", "has no tokens", "Give at least one token, such as the model's bos token")
        if outside := [token for token in ids if not 0 <= token < self.vocab_size]:
            raise ModelError("prompt", f"token {outside[0]} is not in a vocabulary of {self.vocab_size}",
                             "Use the tokenizer that belongs to the model")  # fmt: skip
        if len(ids) >= self.slot_tokens:
            raise CapacityError("prompt", f"{len(ids)} tokens leave no room in a slot of {self.slot_tokens}",
                                "Shorten the prompt, or load the decoder with a larger slot_tokens")  # fmt: skip
        if not self.free_slots:
            raise CapacityError("decoder", f"all {self.slots} slots are taken",
                                "Free one first, or load it with more slots")  # fmt: skip
        slot, held = self._place(ids[: min(reuse, len(ids) - 1)])
        self._sequences[slot] = _Sequence(list(ids), prompt=len(ids), length=held, live=True)
        return slot

    def free(self, slot: int) -> None:
        """Give the slot back; what it held may serve an `admit` with `reuse`."""
        self._freed += 1
        self._sequences[slot].live, self._sequences[slot].freed = False, self._freed

    def pending(self, slot: int) -> int:
        return max(0, self._sequences[slot].prompt - self._sequences[slot].length)

    def length(self, slot: int) -> int:
        return self._sequences[slot].length

    def chunks(self, slots: Sequence[int], max_tokens: int) -> list[list[int]]:
        """The next prompt tokens of each slot, at most `max_tokens`.  Raises ValueError for a slot without any."""
        self._check(slots, pending=True)
        sequences = [self._sequences[slot] for slot in slots]
        return [s.tokens[s.length : min(s.length + max_tokens, s.prompt)] for s in sequences]

    def append(self, slots: Sequence[int], tokens: Sequence[int]) -> list[list[int]]:
        """Note one more token for each slot.  Raises CapacityError, and ValueError for a slot not ready to step."""
        self._check(slots, pending=False)
        for slot, token in zip(slots, tokens, strict=True):
            if self._sequences[slot].length >= self.slot_tokens:
                raise CapacityError(f"slot {slot}", f"holds {self.slot_tokens} tokens, its limit",
                                    "Finish the sequence, or load the decoder with more slot_tokens")  # fmt: skip
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"token {token} is not in a vocabulary of {self.vocab_size}")
        for slot, token in zip(slots, tokens, strict=True):
            sequence = self._sequences[slot]
            sequence.tokens[sequence.length :] = [token]
        return [[token] for token in tokens]

    def hold(self, slots: Sequence[int], chunks: Sequence[Sequence[int]]) -> None:
        """The cache now holds these chunks too."""
        for slot, chunk in zip(slots, chunks, strict=True):
            self._sequences[slot].length += len(chunk)

    def _place(self, prefix: Sequence[int]) -> tuple[int, int]:
        """A free slot, and how many tokens of `prefix` it holds now."""
        free = [slot for slot in self._order() if not self._sequences[slot].live]
        if not prefix:
            return free[0], 0
        oldest = min(free, key=lambda slot: self._sequences[slot].freed)
        shared, _, donor = max((s.shared(prefix), not s.live, slot) for slot, s in enumerate(self._sequences))
        if donor in free and (2 * shared > self.length(donor) or len(free) == 1):
            return donor, shared
        if shared:
            self._copy(donor, oldest, shared)
        return oldest, shared

    def _check(self, slots: Sequence[int], *, pending: bool) -> None:
        """A caller's mistakes would corrupt other sequences silently; they are bugs, so they are ValueErrors."""
        if len(set(slots)) != len(slots) or not slots:
            raise ValueError(f"slots {list(slots)} must be named once each")
        for slot in slots:
            sequence = self._sequences[slot]
            if not sequence.live or (sequence.length < sequence.prompt) is not pending:
                raise ValueError(f"slot {slot} is {'not waiting for prefill' if pending else 'not ready to step'}")


class Slotted:
    """What every decoder over a `SlotBook` answers alike (see `decode.base`)."""

    _book: SlotBook

    @property
    def slots(self) -> int:
        return self._book.slots

    @property
    def slot_tokens(self) -> int:
        return self._book.slot_tokens

    @property
    def capacity(self) -> int:
        return self.slots * self.slot_tokens

    @property
    def free_slots(self) -> int:
        return self._book.free_slots

    @property
    def vocab_size(self) -> int:
        return self._book.vocab_size

    def admit(self, ids: Sequence[int], *, reuse: int = 0) -> int:
        return self._book.admit(ids, reuse)

    def pending(self, slot: int) -> int:
        return self._book.pending(slot)

    def length(self, slot: int) -> int:
        return self._book.length(slot)

    def free(self, slot: int) -> None:
        self._book.free(slot)
