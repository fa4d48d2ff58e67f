"""The key-value cache of `TorchDecoder`: one tensor whose rows are sequences of different lengths.

transformers' own caches keep all sequences of a batch at the same length.  Here every row has a length of its own: new
keys and values are written at each row's own positions, and attention sees the rows only up to the longest of the
batch, under a mask that ends each row where it ends.  Three things keep a step cheap on a CPU:

* The rows of a step lie side by side, so that a layer's keys are a view of the cache, never a gather.  The decoder
  swaps rows when a sequence leaves, which costs one copy per departure, not one per step.
* The mask is built once per forward pass for each kind of layer, not once per layer.
* A sliding-window layer reads from the oldest token that any row of the batch can still see.

What attention sees grows in leaps of `LEAP` tokens, the rest masked: on a GPU, cuDNN plans anew for every new shape,
which took twice the time of the step itself.

    B rows of this call   T new tokens   L live tokens (keys seen)   J key-value heads   C head size
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PretrainedConfig

from bitdistill_ray.errors import ModelError
from bitdistill_ray.model.families import head_size

LEAP = 32  # tokens


class LayerKind(StrEnum):
    """What a layer attends to; the values are those of `layer_types` in a Hugging Face config."""

    FULL = "full_attention"
    SLIDING = "sliding_attention"


def layer_kinds(config: PretrainedConfig) -> tuple[LayerKind, ...]:
    """The kind of every layer.  Raises ModelError for kinds whose state is not a key-value cache."""
    default = LayerKind.FULL if getattr(config, "sliding_window", None) is None else LayerKind.SLIDING
    names = getattr(config, "layer_types", None) or [default.value] * config.num_hidden_layers
    unknown = sorted(set(names) - set(LayerKind))
    if unknown:
        raise ModelError(
            f"config.layer_types of {config.model_type}",
            f"{unknown[0]!r}",
            "Use a model with full or sliding attention",
        )
    return tuple(LayerKind(name) for name in names)


@dataclass(frozen=True, slots=True)
class _View:
    """What the layers of one kind see in one forward pass: keys `first` .. `live`, under `mask_B1TL` (additive)."""

    first: int
    mask_B1TL: Tensor


class SlotCache(Cache):  # type: ignore[misc]  # transformers is untyped
    """Keys and values of `rows` sequences of up to `tokens` tokens; `begin` before every forward pass.

    `kv` is [layers, 2, rows, J, tokens + 1, C].  The last token of a row is a place for padding to be written to.
    It starts as zeros because masked keys still meet a weight of 0, and 0 * NaN would be NaN.
    """

    def __init__(
        self, config: PretrainedConfig, *, rows: int, tokens: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        super().__init__(layers=[])
        self.kinds = layer_kinds(config)
        self.tokens = tokens
        self.window: int = config.sliding_window if LayerKind.SLIDING in self.kinds else tokens
        shape = (len(self.kinds), 2, rows, config.num_key_value_heads, tokens + 1, head_size(config))
        self.kv = torch.zeros(shape, dtype=dtype, device=device)
        self.rows = rows
        self._columns, self._numbers = torch.arange(tokens, device=device), torch.arange(rows, device=device)
        self._rows: slice | Tensor = slice(0, 0)
        self._rows_B1 = self._write_BT = self._columns[:0]
        self._live = 0
        self._views: dict[LayerKind, _View] = {}

    def begin(self, rows: Sequence[int], starts: Sequence[int], counts: Sequence[int]) -> tuple[Tensor, Any]:
        """Prepare a pass in which row `rows[i]` appends `counts[i]` tokens from its position `starts[i]` on.

        T = max(counts); shorter rows are padded at their end, and their padding is written where nobody reads.
        Returns (position_ids_BT, attention_mask): the mask is one tensor, or a dict by layer kind where the model
        mixes kinds, as the Hugging Face models of such families expect.
        """
        start_B1, count_B1 = torch.tensor([[*starts], [*counts]], device=self.kv.device)[:, :, None]
        live = max(start + count for start, count in zip(starts, counts, strict=True))
        oldest = max(0, min(starts) - self.window + 1) // LEAP * LEAP
        contiguous = list(rows) == list(range(rows[0], rows[0] + len(rows)))
        where = slice(rows[0], rows[0] + len(rows)) if contiguous else torch.tensor(rows, device=self.kv.device)
        return self.see(where, start_B1, count_B1, width=max(counts), live=self.leap(live), oldest=oldest)

    def leap(self, live: int, leap: int = LEAP) -> int:
        """`live` tokens in whole leaps, as many as a row holds at most."""
        return min(-(-live // leap) * leap, self.tokens)

    def see(
        self, rows: slice | Tensor, start_B1: Tensor, count_B1: Tensor, *, width: int, live: int, oldest: int
    ) -> tuple[Tensor, Any]:
        """`begin` on the device alone, with nothing asked of it: each row appends `count` (of `width`) tokens at
        `start`; full layers see the tokens before `live`, sliding ones from `oldest` on."""
        step_T = self._columns[:width]
        real_BT = step_T < count_B1
        positions_BT = torch.where(real_BT, start_B1 + step_T, 0)
        self._write_BT = torch.where(real_BT, positions_BT, self.tokens)
        self._live, self._rows = live, rows
        self._rows_B1 = self._numbers[rows, None]
        self._views = {kind: self._view(kind, positions_BT, oldest) for kind in dict.fromkeys(self.kinds)}
        masks = {kind.value: view.mask_B1TL for kind, view in self._views.items()}
        return positions_BT, masks if len(masks) > 1 else next(iter(masks.values()))

    def _view(self, kind: LayerKind, positions_BT: Tensor, oldest: int) -> _View:
        first = oldest if kind is LayerKind.SLIDING else 0
        key_L, query_BT1 = self._columns[first : self._live], positions_BT[:, :, None]
        seen_BTL = key_L <= query_BT1
        if kind is LayerKind.SLIDING:
            # padding queries stand at position 0 and may see nothing; their softmax is uniform and nobody reads it
            seen_BTL &= key_L > query_BT1 - self.window
        mask_BTL = torch.zeros(seen_BTL.shape, dtype=self.kv.dtype, device=self.kv.device)
        return _View(first, mask_BTL.masked_fill_(~seen_BTL, torch.finfo(self.kv.dtype).min)[:, None])

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write k_BJTC and v_BJTC at the positions given to `begin`; returns the layer's live keys and values BJLC."""
        keys, values = self.kv[layer_idx]
        keys[self._rows_B1, :, self._write_BT] = key_states.transpose(1, 2).to(keys.device)
        values[self._rows_B1, :, self._write_BT] = value_states.transpose(1, 2).to(keys.device)
        first, here = self._views[self.kinds[layer_idx]].first, key_states.device  # a spread model: layers elsewhere
        live = slice(first, self._live)
        return keys[self._rows, :, live].to(here), values[self._rows, :, live].to(here)

    def swap(self, row: int, other: int, live: int) -> None:
        """Exchange the first `live` tokens of two rows, in every layer."""
        self.kv[:, :, [row, other], :, :live] = self.kv[:, :, [other, row], :, :live]

    def copy(self, row: int, other: int, live: int) -> None:
        """Write the first `live` tokens of `row` over those of `other`, in every layer."""
        self.kv[:, :, other, :, :live] = self.kv[:, :, row, :, :live]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that this pass sees (transformers asks; positions are always given explicitly)."""
        return self._live
