"""Which layer of the student learns from which of the teacher's, for relations and for layer states.

A layer of the student learns from the one at its own depth, so that teacher and student may differ in their number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bitdistill_ray.loss_config import LossConfig


@dataclass(frozen=True, slots=True)
class LayerPairs:
    """(teacher's, student's), counted from 0: of relations, and of layer states."""

    relation: tuple[int, int] | None = None
    states: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(
        cls, loss: LossConfig, relation_layer: int | None, *, teacher: Callable[[], int], student: int
    ) -> LayerPairs:
        """`relation_layer` of the teacher, which may have been searched for; `teacher()` is asked how many layers there
        are if one of them is wanted, `student` has so many."""
        if relation_layer is None and loss.states is None:
            return cls()
        layers, relation = teacher(), None
        if loss.relation is not None and relation_layer is not None:
            chosen = loss.relation.student_layer
            relation = (relation_layer % layers, student_layer(relation_layer, layers, student, chosen=chosen))
        taught = loss.states.of(layers) if loss.states else ()
        return cls(relation, tuple((layer, student_layer(layer, layers, student)) for layer in taught))

    @property
    def tapped(self) -> tuple[int, ...]:
        """The student's layers whose attention states are read."""
        return () if self.relation is None else (self.relation[1],)


def student_layer(layer: int, teacher_layers: int, student_layers: int, *, chosen: int | None = None) -> int:
    """The student's layer that learns from the teacher's `layer`: the chosen one, else that at the same depth."""
    if chosen is not None:
        return chosen % student_layers
    layer %= teacher_layers
    return max(0, round((layer + 1) * student_layers / teacher_layers) - 1)
