"""The LM head: hidden states in, logits out, with whatever the family does to its logits.

A student's head calls the model's own `lm_head` *module*, never its weight: under ZeRO-3 the module's hooks gather the
sharded weight.  A teacher's head travels to the student's side once, as tensors, and is applied there to the hidden
states that the teacher sends.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from bitdistill_ray.model.families import family_of


class LMHead(nn.Module):
    """logits = W h, then c tanh(logits / c) where the family caps its logits (Gemma).

    Its `state_dict` is what `from_tensors` takes: `linear.weight`, perhaps `linear.bias`, and `softcap` (0: none).
    """

    softcap: Tensor

    def __init__(self, linear: nn.Linear, softcap: float | None) -> None:
        super().__init__()
        self.linear = linear
        self.cap = softcap
        self.register_buffer("softcap", torch.tensor(softcap or 0.0, dtype=torch.float32))

    @classmethod
    def of(cls, model: nn.Module) -> LMHead:
        """The head of a model, sharing its `lm_head` module."""
        family = family_of(model.config)
        softcap = getattr(model.config, family.softcap_key, None) if family.softcap_key else None
        return cls(cast(nn.Linear, model.get_submodule(family.head)), softcap)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> LMHead:
        """A frozen head from the `state_dict` of another one, in the dtype and on the device of its tensors."""
        weight_VD, bias_V = tensors["linear.weight"], tensors.get("linear.bias")
        linear = nn.Linear(weight_VD.shape[1], weight_VD.shape[0], bias=bias_V is not None, device="meta")
        linear.weight = nn.Parameter(weight_VD, requires_grad=False)
        if bias_V is not None:
            linear.bias = nn.Parameter(bias_V, requires_grad=False)
        return cls(linear, float(tensors["softcap"]) or None)

    def frozen_copy(self) -> LMHead:
        """The same head with weights of its own that need no gradient (not for weights that ZeRO-3 has sharded)."""
        return LMHead.from_tensors({name: tensor.detach().clone() for name, tensor in self.state_dict().items()})

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., D], in the dtype of the weight."""
        logits: Tensor = self.linear(hidden)
        if self.cap is not None:
            logits = torch.tanh(logits / self.cap) * self.cap
        return logits
