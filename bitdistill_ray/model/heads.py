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

    Shares the `lm_head` module of `model`, a causal LM of a supported family.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        family = family_of(model.config)
        self.linear = cast(nn.Linear, model.get_submodule(family.head))
        self.softcap: float | None = getattr(model.config, family.softcap_key, None) if family.softcap_key else None

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., D], in the dtype of the weight."""
        return softcapped(self.linear(hidden), self.softcap)

    def frozen_copy(self) -> FrozenHead:
        """The same head with weights of its own that need no gradient (not for weights that ZeRO-3 has sharded)."""
        tensors = {name: tensor.detach().clone() for name, tensor in self.linear.state_dict().items()}
        return FrozenHead({**tensors, "softcap": torch.tensor(self.softcap or 0.0, dtype=torch.float32)})


class FrozenHead(nn.Module):
    """A head apart from its model, made of tensors: `weight` [V, D], perhaps `bias` [V], `softcap` (fp32, 0: none).

    They are its `state_dict` again, so that `FrozenHead(head.state_dict())` is the same head elsewhere.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.register_buffer("weight", tensors["weight"])
        self.register_buffer("bias", tensors.get("bias"))
        self.register_buffer("softcap", tensors["softcap"])
        self._softcap = float(tensors["softcap"]) or None  # a number, so that no forward pass waits for the device

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., D], in the dtype of the weight."""
        return softcapped(nn.functional.linear(hidden, self.weight, self.bias), self._softcap)


def softcapped(logits: Tensor, cap: float | None) -> Tensor:
    """c tanh(logits / c), or the logits where there is no cap."""
    return logits if cap is None else torch.tanh(logits / cap) * cap
