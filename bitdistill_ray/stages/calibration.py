"""What the stages that change weights before training share: the student, its calibration text, what they leave."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from bitdistill_ray.core import TokenBatch
from bitdistill_ray.hardware import compute_dtype, local_device
from bitdistill_ray.model.acceleration import decoder_layers
from bitdistill_ray.model.linear import QuantLinear
from bitdistill_ray.model.student import load_student, save_student
from bitdistill_ray.quant import Moments
from bitdistill_ray.runs import StageRecord, provenance
from bitdistill_ray.stage_config import CalibratedStage
from bitdistill_ray.stages.base import StageContext
from bitdistill_ray.stages.blocks import Block, Kept, blocks
from bitdistill_ray.stages.corpus import corpus_of, first_batches
from bitdistill_ray.stages.notes import Notes


@dataclass(slots=True)
class Calibration:
    """A student whose linears one stage changes."""

    context: StageContext
    model: Any
    tokenizer: Any
    batches: list[TokenBatch]

    @classmethod
    def load(cls, context: StageContext) -> Calibration:
        """The newest student on this task's device, and the first sequences of the corpus."""
        options = context.stage
        assert isinstance(options, CalibratedStage)
        device = local_device()
        dtype, _ = compute_dtype(context.config.student.dtype, device)
        source = context.fetch("student")
        model, tokenizer = load_student(source, dtype=dtype, device=device)
        batches = first_batches(corpus_of(context, str(source)), options.calibration_sequences)
        return cls(context, model, tokenizer, batches)

    @property
    def options(self) -> CalibratedStage:
        """The stage's section of the configuration."""
        assert isinstance(self.context.stage, CalibratedStage)
        return self.context.stage

    def linears(self) -> list[str]:
        """Names of the linears that are to change."""
        return [
            name
            for name, module in self.model.named_modules()
            if isinstance(module, QuantLinear) and module.spec is not None and self._chosen(name)
        ]

    def blocks(self, notes: Notes, make: Callable[[QuantLinear], Kept]) -> Iterator[Block[Kept]]:
        """The model's blocks with statistics of these linears (`blocks.py`), with progress on the terminal."""
        found = blocks(self.model, self.batches, make, quantised_inputs=self.options.quantised_inputs,
                       chosen=self._chosen)  # fmt: skip
        return notes.each(found, total=len(decoder_layers(self.model)))

    def each(self, notes: Notes, make: Callable[[QuantLinear], Kept]) -> Iterator[tuple[str, QuantLinear, Kept]]:
        """Name, linear and statistics of each of them, block by block."""
        for block in self.blocks(notes, make):
            for name, linear in block.linears.items():
                yield name, linear, block.statistics.pop(name)

    def publish(self, role: str, *, before: float, after: float) -> StageRecord:
        """Publish `student/`; the record also names it as `role`, and says which part of the output error is left."""
        context, path = self.context, self.context.path("student")
        with context.run.publish(path) as folder:
            save_student(folder, self.model, self.tokenizer, provenance=provenance(context.config, stage=context.name))
        left = round(after / before, 4) if before else 1.0
        return context.record({"student": path, role: path}, linears=len(self.linears()), error_left=left)

    def _chosen(self, name: str) -> bool:
        return not any(fnmatchcase(name, pattern) for pattern in self.options.exclude)


def whole_moments(linear: QuantLinear) -> Moments:
    """Empty second moments of all inputs of a linear together."""
    return Moments(linear.in_features, linear.in_features, device=linear.weight.device)
