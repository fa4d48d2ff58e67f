"""From a batch of packed tokens to what the LM head consumes.

Documents that share a row must not see each other.  The positions of a TokenBatch restart at every document, and
transformers builds its masks from that (block-diagonal, with the sliding window inside a document) as long as it gets
neither a mask nor a cache; the tests hold it to that for every family, because nothing else would tell.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from bitdistill_ray.core import TokenBatch


def hidden_states(model: nn.Module, batch: TokenBatch) -> Tensor:
    """hidden_BTD after the final norm; every document as if it were alone, padding one more document.

    `model` is a causal LM of a supported family; the head is not run, see `heads.LMHead`.
    """
    base = cast(nn.Module, model.base_model)
    return cast(
        Tensor,
        base(input_ids=batch.ids_BT, position_ids=batch.positions_BT, use_cache=False).last_hidden_state,
    )
