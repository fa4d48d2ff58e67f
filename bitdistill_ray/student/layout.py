"""Which tensors DeepSpeed sees as a student's parameters: those of the model, or all of them as two long ones.

ZeRO-1 and ZeRO-2 run a hook for every parameter, copy its gradient into a bucket and from there into a partition.  For
the 272 parameters of a 135M student that is 40 of the 55 ms in which Python hands a step to a GPU that needs 66 for it;
with two long parameters it is nothing.  Only a recorded pass (`recording.py`) may use them: it cuts them into the
model's own shapes by itself, while the model's parameters are views of their memory.

A large student's GPU is slower than its Python, and long parameters cost it copies of their size: it keeps its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from bitdistill_ray.core import TeacherSignals, TokenBatch
from bitdistill_ray.losses.reduction import Totals
from bitdistill_ray.student.module import LossModule, Pass

MOST_WEIGHTS = 400_000_000  # of a student whose parameters are laid out as two


class Layout(Protocol):
    """The leaves that a pass is differentiated by, and the model's parameters made of them."""

    def leaves(self) -> list[nn.Parameter]:
        """What DeepSpeed trains."""
        ...

    def named(self, leaves: Sequence[Tensor]) -> Mapping[str, Tensor]:
        """The trained parameters of the LossModule by name, made of tensors that stand for the leaves."""
        ...


class OwnParameters:
    """Every parameter is a leaf."""

    def __init__(self, module: nn.Module) -> None:
        self._named = {name: p for name, p in module.named_parameters() if p.requires_grad}

    def leaves(self) -> list[nn.Parameter]:
        """See Layout."""
        return list(self._named.values())

    def named(self, leaves: Sequence[Tensor]) -> Mapping[str, Tensor]:
        """See Layout."""
        return dict(zip(self._named, leaves, strict=True))


class LongParameters(nn.Module):
    """What DeepSpeed wraps in place of `module`: the matrices as one parameter, and everything else as another.

    Call `adopt` whenever DeepSpeed may have moved them: then the module's parameters are views of them again.
    """

    def __init__(self, module: LossModule, device: torch.device) -> None:
        super().__init__()
        module.to(device)
        own = {name: p for name, p in module.named_parameters() if p.requires_grad}
        parts = [{n: p for n, p in own.items() if (p.ndim > 1) == matrices} for matrices in (True, False)]
        self._own, self._parts = own, [part for part in parts if part]
        self.long = nn.ParameterList(
            nn.Parameter(torch.cat([p.detach().flatten() for p in part.values()])) for part in self._parts
        )
        self._module = (module,)  # in a tuple, where nn.Module does not look for submodules
        self.adopt()

    def forward(
        self, batch: TokenBatch, signals: TeacherSignals | None, totals: Totals
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What DeepSpeed calls: the module, whose `replay` is differentiated by these parameters."""
        replay: Pass | None = self._module[0].replay
        assert replay is not None  # a pass that is not recorded would leave its gradients at the model's parameters
        return replay(batch, signals, totals)

    @property
    def matrices(self) -> list[nn.Parameter]:
        """Those of the leaves that hold matrices, which weight decay is for."""
        return [p for p, part in zip(self.long, self._parts, strict=True) if next(iter(part.values())).ndim > 1]

    def adopt(self) -> None:
        """Make the module's parameters views of the long ones."""
        for name, view in self.named([p.detach() for p in self.long]).items():
            self._own[name].data = view

    def leaves(self) -> list[nn.Parameter]:
        """See Layout."""
        return list(self.long)

    def named(self, leaves: Sequence[Tensor]) -> Mapping[str, Tensor]:
        """See Layout."""
        made: dict[str, Tensor] = {}
        for leaf, part in zip(leaves, self._parts, strict=True):
            pieces = torch.split(leaf, [p.numel() for p in part.values()])  # one concatenation in the backward pass
            made |= {name: piece.view_as(p) for (name, p), piece in zip(part.items(), pieces, strict=True)}
        return made


def can_lay_out(module: nn.Module, *, zero: int, recorded: bool) -> bool:
    """Whether this student's parameters are laid out as two: small, of one dtype, recorded, under ZeRO-1 or 2."""
    trained = [p for p in module.parameters() if p.requires_grad]
    one_dtype = len({p.dtype for p in trained}) == 1
    return recorded and zero in (1, 2) and one_dtype and sum(p.numel() for p in trained) <= MOST_WEIGHTS
