"""From a batch of packed tokens to what the LM head consumes.

Documents that share a row must not see each other.  The positions of a TokenBatch restart at every document, and
transformers builds its masks from that (block-diagonal, with the sliding window inside a document) as long as it gets
neither a mask nor a cache; the tests hold it to that for every family, because nothing else would tell.  Only
flex_attention, on GPUs, is given masks of our own (`masks.py`).
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from bitdistill_ray.core import TokenBatch
from bitdistill_ray.model.taps import FLEX, TAPPED


def hidden_states(model: nn.Module, batch: TokenBatch) -> Tensor:
    """hidden_BTD after the final norm; every document as if it were alone, padding one more document.

    `model` is a causal LM of a supported family; the head is not run, see `heads.LMHead`.
    """
    base, config = cast(nn.Module, model.base_model), cast(Any, model.config)
    masks = None
    if config._attn_implementation in (FLEX, TAPPED[FLEX]):
        from bitdistill_ray.model.masks import block_masks  # a torch without flex_attention has no such module

        masks = block_masks(config, batch.segment_BT)
    output = base(input_ids=batch.ids_BT, position_ids=batch.positions_BT, attention_mask=masks, use_cache=False)
    return cast(Tensor, output.last_hidden_state)
