"""The decoder over a Hugging Face model: every supported family, full precision or packed, on a CPU or a GPU.

The model's own modules compute; this file only decides which rows of the cache they see.  It runs the base model and
applies the head to the last token of each sequence alone, so that a prefill never makes [T, V] logits.  On a GPU, steps
are replayed from CUDA graphs (`step_graphs.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bitdistill_ray.decode.cache import SlotCache
from bitdistill_ray.decode.slot_book import SlotBook, Slotted
from bitdistill_ray.decode.step_graphs import StepGraphs
from bitdistill_ray.errors import ModelError
from bitdistill_ray.model.heads import LMHead

MASKED_ATTENTION = ("sdpa", "eager")  # the implementations that take an additive 4-D mask


class TorchDecoder(Slotted):
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
        tokens = min(slot_tokens, config.max_position_embeddings)
        self._cache = SlotCache(config, rows=slots, tokens=tokens, dtype=model.dtype, device=self._device)
        devices = {parameter.device for parameter in model.parameters()}
        replayed = (self._device.type == "cuda" and len(devices) == 1) if graphs is None else graphs
        self._graphs = StepGraphs(self._cache, self._run) if replayed else None
        self._row_of_slot = list(range(slots))
        self._slot_of_row = list(range(slots))
        self._book = SlotBook(slots, tokens, int(config.vocab_size), self._copy, order=lambda: self._slot_of_row)

    @classmethod
    def load(cls, path: str, device: torch.device | str = "cpu", *, slots: int = 8, slot_tokens: int = 2048) -> Self:
        """Load a packed folder, or any model source that `model.load_model` knows, in fp32 on a CPU, else in bf16."""
        from bitdistill_ray.decode.loading import load_for_decoding

        model, _ = load_for_decoding(path, device=device)
        return cls(model, slots=slots, slot_tokens=slot_tokens)

    @property
    def device(self) -> torch.device:
        return self._device

    def prefill(self, slots: Sequence[int], max_tokens: int) -> list[Tensor | None]:
        chunks = self._book.chunks(slots, max_tokens)
        last_BD = self._last(slots, chunks)
        ready = [i for i, slot in enumerate(slots) if not self.pending(slot)]
        logits: list[Tensor | None] = [None] * len(slots)
        if ready:
            for i, logits_V in zip(ready, self._logits(last_BD[ready]), strict=True):
                logits[i] = logits_V
        return logits

    def read(self, slot: int, max_tokens: int) -> Tensor:
        hidden_1TD, _ = self._forward([slot], self._book.chunks([slot], max_tokens))
        return self._logits(hidden_1TD[0])

    def step(self, slots: Sequence[int], tokens: Sequence[int]) -> Tensor:
        chunks = self._book.append(slots, tokens)
        self._bring_together(slots)
        if self._graphs is None:
            return self._logits(self._last(slots, chunks))
        logits_BV = self._graphs([self._row_of_slot[slot] for slot in slots], [self.length(s) for s in slots], tokens)
        self._book.hold(slots, chunks)
        return logits_BV

    def _copy(self, slot: int, other: int, tokens: int) -> None:
        self._cache.copy(self._row_of_slot[slot], self._row_of_slot[other], tokens)

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
        self._book.hold(slots, chunks)
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
