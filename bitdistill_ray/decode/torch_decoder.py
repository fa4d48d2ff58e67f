"""The decoder over a Hugging Face model: every supported family, full precision or packed, on a CPU or a GPU.

The model's own modules compute; this file only decides which rows of the cache they see.  It runs the base model and
applies the head to the last token of each sequence alone, so that a prefill never makes [T, V] logits.  On a GPU, steps
are replayed from CUDA graphs (`step_graphs.py`).

A slot that was freed keeps its tokens and their keys and values until it is given away.  A prompt that begins as they
do takes such a slot over where most of it serves, and else a copy of the common part, also from a slot that still runs:
copying a token costs a few kilobytes of memory traffic, computing it a pass over the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bitdistill_ray.decode.base import CapacityError
from bitdistill_ray.decode.cache import SlotCache
from bitdistill_ray.decode.step_graphs import StepGraphs
from bitdistill_ray.errors import ModelError
from bitdistill_ray.model.heads import LMHead

MASKED_ATTENTION = ("sdpa", "eager")  # the implementations that take an additive 4-D mask


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


class TorchDecoder:
    """A `Decoder` (see `decode.base`) over any causal LM with full or sliding-window attention."""

    def __init__(
        self, model: PreTrainedModel, *, slots: int = 8, slot_tokens: int = 2048, graphs: bool | None = None
    ) -> None:
        """`graphs`: whether steps run in the few shapes that are recorded; empty: where they are, on one GPU."""
        config = model.config
        if config._attn_implementation not in MASKED_ATTENTION:
            raise ModelError(
                f"attention of {config.model_type}",
                f"{config._attn_implementation!r} takes no 4-D mask",
                "Load the model with attn_implementation='sdpa'",
            )
        self.model = model.eval()
        self._base, self._head = model.base_model, LMHead(model)
        self._device: torch.device = model.device
        self._slot_tokens: int = min(slot_tokens, config.max_position_embeddings)
        self._cache = SlotCache(config, rows=slots, tokens=self._slot_tokens, dtype=model.dtype, device=self._device)
        devices = {parameter.device for parameter in model.parameters()}
        replayed = (self._device.type == "cuda" and len(devices) == 1) if graphs is None else graphs
        self._graphs = StepGraphs(self._cache, self._run) if replayed else None
        self._sequences = [_Sequence() for _ in range(slots)]
        self._freed = 0
        self._row_of_slot = list(range(slots))
        self._slot_of_row = list(range(slots))

    @classmethod
    def load(cls, path: str, device: torch.device | str = "cpu", *, slots: int = 8, slot_tokens: int = 2048) -> Self:
        """Load a packed folder, or any model source that `model.load_model` knows, in fp32 on a CPU, else in bf16."""
        from bitdistill_ray.decode.loading import load_for_decoding

        model, _ = load_for_decoding(path, device=device)
        return cls(model, slots=slots, slot_tokens=slot_tokens)

    @property
    def slots(self) -> int:
        return len(self._sequences)

    @property
    def slot_tokens(self) -> int:
        return self._slot_tokens

    @property
    def capacity(self) -> int:
        return self.slots * self.slot_tokens

    @property
    def free_slots(self) -> int:
        return sum(not sequence.live for sequence in self._sequences)

    @property
    def vocab_size(self) -> int:
        return int(self.model.config.vocab_size)

    @property
    def device(self) -> torch.device:
        return self._device

    def admit(self, ids: Sequence[int], *, reuse: int = 0) -> int:
        if not ids:
            raise ModelError("prompt", "has no tokens", "Give at least one token, such as the model's bos token")
        if outside := [token for token in ids if not 0 <= token < self.vocab_size]:
            raise ModelError("prompt", f"token {outside[0]} is not in a vocabulary of {self.vocab_size}",
                             "Use the tokenizer that belongs to the model")  # fmt: skip
        if len(ids) >= self.slot_tokens:
            raise CapacityError("prompt", f"{len(ids)} tokens leave no room in a slot of {self.slot_tokens}",
                                "Shorten the prompt, or load the decoder with a larger slot_tokens")  # fmt: skip
        if not self.free_slots:
            raise CapacityError(
                "decoder", f"all {self.slots} slots are taken", "Free one first, or load it with more slots"
            )
        slot, held = self._place(ids[: min(reuse, len(ids) - 1)])
        self._sequences[slot] = _Sequence(list(ids), prompt=len(ids), length=held, live=True)
        return slot

    def _place(self, prefix: Sequence[int]) -> tuple[int, int]:
        """A free slot, and how many tokens of `prefix` it holds now."""
        free = [slot for slot in self._slot_of_row if not self._sequences[slot].live]
        if not prefix:
            return free[0], 0  # the lowest free row keeps the live rows together
        oldest = min(free, key=lambda slot: self._sequences[slot].freed)
        shared, _, donor = max((s.shared(prefix), not s.live, slot) for slot, s in enumerate(self._sequences))
        if donor in free and (2 * shared > self.length(donor) or len(free) == 1):
            return donor, shared
        if shared:
            self._cache.copy(self._row_of_slot[donor], self._row_of_slot[oldest], shared)
        return oldest, shared

    def pending(self, slot: int) -> int:
        return max(0, self._sequences[slot].prompt - self._sequences[slot].length)

    def length(self, slot: int) -> int:
        return self._sequences[slot].length

    def free(self, slot: int) -> None:
        sequence = self._sequences[slot]
        self._freed += 1
        sequence.live, sequence.freed = False, self._freed

    def prefill(self, slots: Sequence[int], max_tokens: int) -> list[Tensor | None]:
        chunks = self._chunks(slots, max_tokens)
        last_BD = self._last(slots, chunks)
        ready = [i for i, slot in enumerate(slots) if not self.pending(slot)]
        logits: list[Tensor | None] = [None] * len(slots)
        if ready:
            for i, logits_V in zip(ready, self._logits(last_BD[ready]), strict=True):
                logits[i] = logits_V
        return logits

    def read(self, slot: int, max_tokens: int) -> Tensor:
        hidden_1TD, _ = self._forward([slot], self._chunks([slot], max_tokens))
        return self._logits(hidden_1TD[0])

    def _chunks(self, slots: Sequence[int], max_tokens: int) -> list[list[int]]:
        self._check(slots, pending=True)
        sequences = [self._sequences[slot] for slot in slots]
        return [s.tokens[s.length : min(s.length + max_tokens, s.prompt)] for s in sequences]

    def step(self, slots: Sequence[int], tokens: Sequence[int]) -> Tensor:
        self._check(slots, pending=False)
        for slot in slots:
            if self._sequences[slot].length >= self.slot_tokens:
                raise CapacityError(
                    f"slot {slot}",
                    f"holds {self.slot_tokens} tokens, its limit",
                    "Finish the sequence there, or load the decoder with a larger slot_tokens",
                )
        self._bring_together(slots)
        for slot, token in zip(slots, tokens, strict=True):
            sequence = self._sequences[slot]
            sequence.tokens[sequence.length :] = [token]
        if self._graphs is None:
            return self._logits(self._last(slots, [[token] for token in tokens]))
        logits_BV = self._graphs([self._row_of_slot[slot] for slot in slots], [self.length(s) for s in slots], tokens)
        for slot in slots:
            self._sequences[slot].length += 1
        return logits_BV

    def _check(self, slots: Sequence[int], *, pending: bool) -> None:
        """A caller's mistakes would corrupt other sequences silently; they are bugs, so they are ValueErrors."""
        if len(set(slots)) != len(slots) or not slots:
            raise ValueError(f"slots {list(slots)} must be named once each")
        for slot in slots:
            if not self._sequences[slot].live or (self.pending(slot) > 0) is not pending:
                raise ValueError(f"slot {slot} is {'not waiting for prefill' if pending else 'not ready to step'}")

    def _bring_together(self, slots: Sequence[int]) -> None:
        """Swap cache rows until `slots` fill neighbouring rows; no work when they already do."""
        rows = sorted(self._row_of_slot[slot] for slot in slots)
        if rows[-1] - rows[0] + 1 == len(rows):
            return
        holes = [row for row in range(len(rows)) if row not in rows]
        for hole, row in zip(holes, [row for row in rows if row >= len(rows)], strict=True):
            slot, other = self._slot_of_row[row], self._slot_of_row[hole]
            self._cache.swap(row, hole, max(self.length(slot), self.length(other)))
            self._row_of_slot[slot], self._row_of_slot[other] = hole, row
            self._slot_of_row[hole], self._slot_of_row[row] = slot, other

    def _last(self, slots: Sequence[int], chunks: Sequence[Sequence[int]]) -> Tensor:
        """`_forward`, and of each slot the output at its chunk's last token, [B, D]."""
        hidden_BTD, rows = self._forward(slots, chunks)
        return hidden_BTD[rows, [len(chunk) - 1 for chunk in chunks]]

    @torch.inference_mode()
    def _forward(self, slots: Sequence[int], chunks: Sequence[Sequence[int]]) -> tuple[Tensor, list[int]]:
        """Append `chunks[i]` to `slots[i]`; returns the base model's output and which of its rows is slot i's."""
        order = sorted(range(len(slots)), key=lambda i: self._row_of_slot[slots[i]])
        counts = [len(chunks[i]) for i in order]
        width = max(counts)
        ids_BT = torch.tensor([[*chunks[i], *[0] * (width - len(chunks[i]))] for i in order], device=self._device)
        positions_BT, mask = self._cache.begin(
            [self._row_of_slot[slots[i]] for i in order], [self.length(slots[i]) for i in order], counts
        )
        hidden_BTD = self._hidden(ids_BT, positions_BT, mask)
        for slot, chunk in zip(slots, chunks, strict=True):
            self._sequences[slot].length += len(chunk)
        place = {i: at for at, i in enumerate(order)}  # from the caller's order to the order of rows
        return hidden_BTD, [place[i] for i in range(len(slots))]

    def _hidden(self, ids_BT: Tensor, positions_BT: Tensor, mask: Any) -> Tensor:
        hidden_BTD: Tensor = self._base(
            input_ids=ids_BT,
            attention_mask=mask,
            position_ids=positions_BT,
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state
        return hidden_BTD

    def _run(self, ids_B1: Tensor, positions_B1: Tensor, mask: Any) -> Tensor:
        """One token of each row: fp32 logits_BV."""
        return self._logits(self._hidden(ids_B1, positions_B1, mask)[:, -1])

    @torch.inference_mode()
    def _logits(self, hidden_BD: Tensor) -> Tensor:
        logits_BV: Tensor = self._head(hidden_BD)
        return logits_BV.float().to(self._device)
