"""The decoder: what serving, `bitdistill generate`, evaluation and the benchmarks drive, whatever runs below it.

A decoder holds one model and a key-value cache of `slots` rows, each with room for `slot_tokens` tokens.  A sequence
lives in one slot from `admit` to `free`.  Its prompt is read in chunks, so that an engine can let running sequences
step between two chunks of a long prompt:

    slot = decoder.admit(prompt)                    # takes a free slot; computes nothing
    while (logits := decoder.prefill([slot], 256)[0]) is None:
        ...                                         # here the engine steps its other slots
    token = choose(logits)                          # logits after the prompt's last token
    logits_BV = decoder.step([slot, other], [token, other_token])
    decoder.free(slot)                              # at the end, or the moment a client hangs up

Where a prompt is to be scored and not only continued, `read` takes the place of `prefill`: it gives the logits after
each token of a chunk, so that nobody holds [T, V] of a long prompt.

Both `prefill` and `step` take several slots and run them as one batch; sequences of different lengths share it.
A decoder is not thread-safe: one thread drives it (an engine gives it a thread of its own).  All calls finish their
work before they return, on a GPU up to the stream's order.

The same sequence gives the same logits whatever shares its batch, up to the rounding of matrix products whose shape
depends on the batch.

    B slots of this call   V vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, Self

from bitdistill_ray.errors import BitdistillError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class CapacityError(BitdistillError):
    """A sequence that the cache has no room for: no slot is free, or it would outgrow its slot."""


class Decoder(Protocol):
    """One model with a slotted key-value cache.  Slots are numbered from 0 to `slots` - 1."""

    @classmethod
    def load(cls, path: str, device: torch.device | str = "cpu", *, slots: int = 8, slot_tokens: int = 2048) -> Self:
        """Load the model at `path` (a packed folder; other decoders may read more) with an empty cache on `device`.

        `slot_tokens` is cut to the longest context that the model knows.  Raises ModelError or PackedError.
        """
        ...

    @property
    def slots(self) -> int:
        """How many sequences can live at the same time."""
        ...

    @property
    def slot_tokens(self) -> int:
        """The longest sequence, prompt and generated tokens together, that a slot holds."""
        ...

    @property
    def capacity(self) -> int:
        """Tokens that the whole cache holds: `slots * slot_tokens`."""
        ...

    @property
    def free_slots(self) -> int:
        """How many more sequences `admit` takes now."""
        ...

    @property
    def vocab_size(self) -> int:
        """V, the width of the logits (it may exceed the tokenizer's vocabulary: models pad their heads)."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the logits lie."""
        ...

    def admit(self, ids: Sequence[int], *, reuse: int = 0) -> int:
        """Give the prompt `ids` a slot and return it.  Nothing is computed until `prefill` or `read`.

        Up to `reuse` of its first tokens may be taken from sequences that live in the cache or did, where those began
        with the same tokens: `length` then tells how many were.  The last token is always read, for its logits.
        Raises CapacityError when no slot is free or the prompt leaves no room for one generated token, ModelError
        when the prompt is empty or an id lies outside the vocabulary.
        """
        ...

    def pending(self, slot: int) -> int:
        """Prompt tokens of `slot` that `prefill` has still to read; 0 when it may step."""
        ...

    def length(self, slot: int) -> int:
        """Tokens of `slot` that the cache holds now."""
        ...

    def prefill(self, slots: Sequence[int], max_tokens: int) -> list[Tensor | None]:
        """Read up to `max_tokens` more prompt tokens of *each* of `slots`, in one batch.

        Returns, for each slot, the fp32 logits [V] after the prompt's last token if its prompt is now read to the
        end, else None.  Every slot must have tokens pending.
        """
        ...

    def read(self, slot: int, max_tokens: int) -> Tensor:
        """Read up to `max_tokens` more prompt tokens of `slot`: the fp32 logits after each of them, [t, V]."""
        ...

    def step(self, slots: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """Append one token to each slot and return the fp32 logits_BV of what follows, one row for each of `slots`.

        Every slot must be prefilled and named once.  Raises CapacityError when a slot holds `slot_tokens` tokens.
        """
        ...

    def free(self, slot: int) -> None:
        """Give the slot back, also in the middle of a prefill.  What it held may serve an `admit` with `reuse`."""
        ...
