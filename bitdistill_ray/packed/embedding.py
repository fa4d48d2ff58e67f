"""PackedEmbedding: an embedding whose table stays packed, in the place of an `nn.Embedding`.

A token's row is dequantised when it is looked up, so a prompt costs its own rows and the table stays at 4 or 8 bits.

    y[t] = Q(W)[id_t] * embed_scale        embed_scale 1 but in Gemma
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from bitdistill_ray.core import Granularity, PackedWeight
from bitdistill_ray.packed.module import PackedModule
from bitdistill_ray.packed.weight import unpack
from bitdistill_ray.quant import dequantize


class PackedEmbedding(PackedModule):
    """ids [...] to [..., K] in the dtype of the module that it replaced."""

    dtype_like: Tensor

    def __init__(self, packed: PackedWeight, empty: nn.Embedding) -> None:
        """In the place of `empty`, with its scale if it has one."""
        super().__init__(packed, "packed embedding")
        self.num_embeddings, self.embedding_dim = packed.shape
        self.scalar_embed_scale: float = getattr(empty, "scalar_embed_scale", 1.0)
        self.register_buffer("dtype_like", torch.empty(0, dtype=empty.weight.dtype), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Raises IndexError for an id outside the table."""
        dtype = self.dtype_like.dtype
        rows = dequantize(unpack(self._rows(ids.flatten()))).to(dtype).reshape(*ids.shape, self.embedding_dim)
        return rows if self.scalar_embed_scale == 1.0 else rows * torch.tensor(self.scalar_embed_scale, dtype=dtype)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.kind()}"

    def _rows(self, ids: Tensor) -> PackedWeight:
        """The packed matrix of some rows."""
        whole, shared = self.packed, self.packed.spec.granularity is Granularity.TENSOR
        zeros = whole.zeros if whole.zeros is None or shared else whole.zeros[ids]
        return replace(whole, shape=(len(ids), self.embedding_dim), codes=whole.codes[ids],
                       scales=whole.scales if shared else whole.scales[ids], zeros=zeros)  # fmt: skip
