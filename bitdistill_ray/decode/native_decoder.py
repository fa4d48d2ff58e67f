"""The native decoder: the whole forward pass in C++, called once per step.  The default for packed students on CPUs.

Where the torch decoder spends a packed student's step in Python and in torch's overhead per operation, this one calls
`bitdistill_kernels` once.  Between the packed products it computes in fp32; keys and values are kept in fp16, or in
int8 with a scale for each head and token.  A sequence's logits are the same bits whatever shares its batch and however
its prompt was cut; products with int8 activations are those of the torch decoder over the same kernels.

`decode.loading` takes it wherever `why_not_native` has nothing to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor

from bitdistill_kernels.decoder import CacheType
from bitdistill_kernels.decoder import NativeDecoder as Library
from bitdistill_ray.decode.native_model import native_model
from bitdistill_ray.decode.slot_book import SlotBook, Slotted


class NativeDecoder(Slotted):
    """A `Decoder` (see `decode.base`) over a packed or full-precision model on the CPU."""

    def __init__(
        self,
        model: Any,
        *,
        slots: int = 8,
        slot_tokens: int = 2048,
        cache: CacheType = CacheType.FP16,
        activation_bits: int | None = None,
    ) -> None:
        """`model`: a Hugging Face causal LM with PackedLinears or plain linears; its tensors are used where they lie.

        `activation_bits` 8 quantises the activations of packed weights that leave them open (weight-only formats).
        Raises ModelError where `why_not_native` says so, KernelError where the kernels are not built.
        """  # fmt: skip
        tokens = min(slot_tokens, int(model.config.max_position_embeddings))
        described = native_model(model, positions=tokens, activation_bits=activation_bits)
        self._library = Library(described, slots=slots, slot_tokens=tokens, cache=cache)
        self._book = SlotBook(slots, tokens, self._library.vocabulary, self._library.copy)

    @classmethod
    def load(cls, path: str, device: torch.device | str = "cpu", *, slots: int = 8, slot_tokens: int = 2048) -> Self:
        """Load a packed folder, or any model source that `model.load_model` knows."""
        from bitdistill_ray.decode.loading import load_decoder

        model, _ = load_decoder(path, device=device)
        return cls(model, slots=slots, slot_tokens=slot_tokens)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values when every slot is full."""
        return self._library.cache_bytes

    def prefill(self, slots: Sequence[int], max_tokens: int) -> list[Tensor | None]:
        chunks = self._book.chunks(slots, max_tokens)
        ready = [len(chunk) == self.pending(slot) for slot, chunk in zip(slots, chunks, strict=True)]
        logits = iter(self._forward(slots, chunks, [int(done) for done in ready]))
        return [next(logits) if done else None for done in ready]

    def read(self, slot: int, max_tokens: int) -> Tensor:
        """Read up to `max_tokens` more prompt tokens of `slot`: the fp32 logits after each of them, [t, V]."""
        chunks = self._book.chunks([slot], max_tokens)
        return self._forward([slot], chunks, [len(chunks[0])])

    def step(self, slots: Sequence[int], tokens: Sequence[int]) -> Tensor:
        return self._forward(slots, self._book.append(slots, tokens), [1] * len(slots))

    def _forward(self, slots: Sequence[int], chunks: Sequence[Sequence[int]], wanted: Sequence[int]) -> Tensor:
        """Append `chunks[i]` to `slots[i]`; returns the logits after the last wanted[i] tokens of each."""
        logits_XV = torch.empty(sum(wanted), self.vocab_size)
        ids = [token for chunk in chunks for token in chunk]
        starts, counts = [self.length(slot) for slot in slots], [len(chunk) for chunk in chunks]
        self._library.forward(slots, starts, counts, ids, wanted, logits_XV)
        self._book.hold(slots, chunks)
        return logits_XV
