"""Block masks of packed rows for flex_attention: a token sees the earlier ones of its own document, and no others.

transformers makes these masks too, but in two forms, by asking the device whether any row holds a second document: the
question makes the host wait, the other form compiles every layer anew in mid-run, and neither can be part of a CUDA
graph.  Here there is one form, made of `segment_BT` by the device alone.

    B batch   T time
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from bitdistill_ray.model.families import family_of

FULL, SLIDING = "full_attention", "sliding_attention"  # what transformers calls a layer's kind
Sees = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Whether query `q` of row `b` sees key `k`: (b, head, q, k), each an index."""


def block_masks(config: Any, segment_BT: Tensor) -> BlockMask | dict[str, BlockMask]:
    """The mask of every layer, in the form that the models of `config`'s family take: one, or one for each kind.

    segment_BT as in `TokenBatch`; padding counts as one more document.
    """
    rows, length = segment_BT.shape

    def mask(sees: Sees) -> BlockMask:
        return create_block_mask(sees, rows, None, length, length, device=segment_BT.device)

    if not family_of(config).mask_of_each_kind:
        return mask(same_document(segment_BT))
    kinds = {FULL: None, SLIDING: getattr(config, "sliding_window", None)}
    return {kind: mask(same_document(segment_BT, kinds[kind])) for kind in sorted(set(config.layer_types))}


def same_document(segment_BT: Tensor, window: int | None = None) -> Sees:
    """Causal attention inside each document, over the last `window` tokens where one is given."""

    def sees(b: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        inside = (q >= k) & (segment_BT[b, q] == segment_BT[b, k])
        return inside if window is None else inside & (q - k < window)

    return sees
