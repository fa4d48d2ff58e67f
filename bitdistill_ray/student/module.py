"""The student and its loss as one module: what DeepSpeed wraps.

Everything that touches parameters happens inside `forward`, so that ZeRO's hooks see it: the base model, and the LM
head once for each chunk of tokens.  On GPUs `forward` may replay a recording of it (`recording.py`).  The teacher's
frozen head is *not* a submodule: it is no parameter of the student's, and ZeRO must neither shard nor cast it.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from bitdistill_ray.core import TeacherSignals, TokenBatch
from bitdistill_ray.losses.chunked import chunked_loss
from bitdistill_ray.losses.objective import Objective
from bitdistill_ray.losses.reduction import Totals
from bitdistill_ray.model.forward import hidden_states
from bitdistill_ray.model.heads import LMHead
from bitdistill_ray.model.layer_taps import layer_taps
from bitdistill_ray.model.taps import attention_taps

Pass = Callable[[TokenBatch, TeacherSignals | None, Totals], tuple[Tensor, dict[str, Tensor]]]


class LossModule(nn.Module):
    """`forward(batch, signals, totals)` is the objective on one micro-batch, and its parts.

    `replay`, if it is set, stands for `loss` in `forward`: the same function, made faster.  `relation_weight`, if it is
    set, stands for the objective's; no buffer, which DeepSpeed would round, and changed in place, where a replay reads.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        *,
        chunk_tokens: int,
        teacher_head: Callable[[Tensor], Tensor] | None = None,
        gamma: float | None = None,
        relation_layer: int | None = None,
        states_layers: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.model = model
        self.objective, self.chunk_tokens, self.gamma = objective, chunk_tokens, gamma
        self.relation_layers = () if relation_layer is None else (relation_layer,)
        self.states_layers = states_layers
        self._heads = (LMHead(model), teacher_head)  # in a tuple, where nn.Module does not look for submodules
        self.replay: Pass | None = None
        self.relation_weight: Tensor | None = None

    @property
    def teacher_head(self) -> Callable[[Tensor], Tensor] | None:
        """The frozen head of a teacher that sends hidden states."""
        return self._heads[1]

    def forward(
        self, batch: TokenBatch, signals: TeacherSignals | None, totals: Totals
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What DeepSpeed calls: `loss`, or its replay."""
        return (self.replay or self.loss)(batch, signals, totals)

    def loss(
        self, batch: TokenBatch, signals: TeacherSignals | None, totals: Totals
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """fp32 scalar to minimise, and detached parts by name; `batch` and `signals` on the module's device."""
        student_head, teacher_head = self._heads
        with (
            attention_taps(self.model, self.relation_layers) as taps,
            layer_taps(self.model, self.states_layers) as outputs,
        ):
            hidden_BTD = hidden_states(self.model, batch)
        loss = chunked_loss(
            hidden_BTD,
            student_head,
            signals,
            teacher_head,
            batch.labels_BT,
            self.objective,
            chunk_tokens=self.chunk_tokens,
            gamma=self.gamma,
            segment_BT=batch.segment_BT,
            student_attention=taps[self.relation_layers[0]] if self.relation_layers else None,
            student_states=outputs.states(),
            totals=totals,
            relation_weight=self.relation_weight,
        )
        return loss.value, loss.parts
