"""`Teacher` as a Ray actor: the model's libraries are imported in the teacher's own process and nowhere else.

Whoever starts an actor imports its class.  torch and transformers cost some five seconds of a CPU; through this class a
registry is there in one, and starts its teachers that much earlier.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitdistill_ray.data.batch import BatchArrays
    from bitdistill_ray.decode.sampling import Sampling
    from bitdistill_ray.losses.gamma import GammaEstimate
    from bitdistill_ray.losses.objective import GammaMode
    from bitdistill_ray.model.identity import ModelIdentity
    from bitdistill_ray.teacher.actor import Written
    from bitdistill_ray.teacher.request import Load, SignalRequest
    from bitdistill_ray.teacher.wire import Message


class TeacherActor:
    """What others ask of a teacher; every method is `Teacher`'s."""

    def __init__(self, source: str, **options: Any) -> None:
        from bitdistill_ray.teacher.actor import Teacher

        self._teacher = Teacher(source, **options)

    def handshake(self) -> ModelIdentity:
        """See `Teacher`."""
        return self._teacher.handshake()

    def describe(self) -> str:
        """See `Teacher`."""
        return self._teacher.describe()

    def load(self) -> Load:
        """See `Teacher`."""
        return self._teacher.load()

    def layers(self) -> int:
        """See `Teacher`."""
        return self._teacher.layers()

    def frozen_head(self) -> Message:
        """See `Teacher`."""
        return self._teacher.frozen_head()

    def score(self, arrays: BatchArrays, request: SignalRequest) -> Message:
        """See `Teacher`."""
        return self._teacher.score(arrays, request)

    def confidence(self, arrays: BatchArrays, mode: GammaMode) -> GammaEstimate:
        """See `Teacher`."""
        return self._teacher.confidence(arrays, mode)

    def write(self, prompts: Sequence[str], samplings: Sequence[Sampling], *, batch: int) -> list[Written]:
        """See `Teacher`."""
        return self._teacher.write(prompts, samplings, batch=batch)
