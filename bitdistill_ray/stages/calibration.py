"""What the stages that change weights before training share: the student, its calibration text, what they leave.

A block is changed by itself, so `tasks` tasks may share them: each reads the whole model, changes every so-manieth
block, and leaves those in the run, where one more task puts them together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from safetensors.torch import load_file, save_file

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
from bitdistill_ray.stages.cluster import on_cluster, on_cluster_each
from bitdistill_ray.stages.corpus import corpus_of, first_batches
from bitdistill_ray.stages.notes import Notes

PARTS, BLOCKS = "parts", "blocks.safetensors"


@dataclass(frozen=True, slots=True)
class Part:
    """Every `of`-th block, from number `number` on."""

    number: int = 0
    of: int = 1


@dataclass(slots=True)
class Calibration:
    """A student whose linears one stage changes: those of its `part` of the blocks."""

    context: StageContext
    model: Any
    tokenizer: Any
    batches: list[TokenBatch]
    part: Part

    @classmethod
    def load(cls, context: StageContext, part: Part) -> Calibration:
        """The newest student on this task's device, and the first sequences of the corpus."""
        options = context.stage
        assert isinstance(options, CalibratedStage)
        source = context.fetch("student")
        model, tokenizer = _student(context)
        batches = first_batches(corpus_of(context, str(source)), options.calibration_sequences)
        return cls(context, model, tokenizer, batches, part)

    @property
    def options(self) -> CalibratedStage:
        """The stage's section of the configuration."""
        assert isinstance(self.context.stage, CalibratedStage)
        return self.context.stage

    def own_layers(self) -> list[str]:
        """Names of the decoder layers in this part."""
        names = {id(module): name for name, module in self.model.named_modules()}
        return [names[id(layer)] for layer in decoder_layers(self.model)[self.part.number :: self.part.of]]

    def blocks(self, notes: Notes, make: Callable[[QuantLinear], Kept]) -> Iterator[Block[Kept]]:
        """The part's blocks with statistics of these linears (`blocks.py`), with progress on the terminal."""
        own = self.own_layers()
        exclude = self.options.exclude

        def chosen(name: str) -> bool:
            return name.startswith(tuple(f"{layer}." for layer in own)) and not _matches(name, exclude)

        found = blocks(self.model, self.batches, make, quantised_inputs=self.options.quantised_inputs, chosen=chosen)
        return notes.each(found, total=len(own))

    def each(self, notes: Notes, make: Callable[[QuantLinear], Kept]) -> Iterator[tuple[str, QuantLinear, Kept]]:
        """Name, linear and statistics of each of them, block by block."""
        for block in self.blocks(notes, make):
            for name, linear in block.linears.items():
                yield name, linear, block.statistics.pop(name)


Change = Callable[[Calibration, Notes], tuple[float, float]]
"""Change the linears of a student's part; returns the error of their outputs before and after."""


def calibrated(change: Change, context: StageContext, *, role: str) -> StageRecord:
    """Run `change` on the cluster and publish `student/`, which the record also names `role`."""
    options = context.stage
    assert isinstance(options, CalibratedStage)
    if options.tasks == 1:
        return on_cluster(partial(_whole, change, role), context)
    parts = [Part(number, options.tasks) for number in range(options.tasks)]
    errors = on_cluster_each([partial(_changed, change, part) for part in parts], context)
    return on_cluster(partial(_joined, role, errors), context)


def _whole(change: Change, role: str, context: StageContext, notes: Notes) -> StageRecord:
    student = Calibration.load(context, Part())
    errors = change(student, notes)
    return _publish(context, student.model, student.tokenizer, role, errors)


def _changed(change: Change, part: Part, context: StageContext, notes: Notes) -> tuple[float, float]:
    """Leave the part's blocks in the run, for `_joined`."""
    student = Calibration.load(context, part)
    errors = change(student, notes)
    layers = [(name, student.model.get_submodule(name)) for name in student.own_layers()]
    tensors = {
        f"{name}.{leaf}": parameter.detach().cpu().contiguous()
        for name, layer in layers
        for leaf, parameter in layer.named_parameters()
    }
    with context.run.publish(_place(context, part)) as folder:
        save_file(tensors, folder / BLOCKS)
    return errors


def _joined(role: str, errors: Sequence[tuple[float, float]], context: StageContext, _notes: Notes) -> StageRecord:
    model, tokenizer = _student(context)
    places = [_place(context, Part(number, len(errors))) for number in range(len(errors))]
    for place in places:
        for name, tensor in load_file(context.run.fetch(place) / BLOCKS).items():
            with torch.no_grad():
                model.get_parameter(name).copy_(tensor)
    record = _publish(context, model, tokenizer, role, (sum(e[0] for e in errors), sum(e[1] for e in errors)))
    context.run.storage.delete(context.path(PARTS))
    return record


def _place(context: StageContext, part: Part) -> str:
    return context.path(f"{PARTS}/{part.number}")


def _student(context: StageContext) -> tuple[Any, Any]:
    device = local_device()
    dtype, _ = compute_dtype(context.config.student.dtype, device)
    return load_student(context.fetch("student"), dtype=dtype, device=device)


def _publish(context: StageContext, model: Any, tokenizer: Any, role: str, errors: tuple[float, float]) -> StageRecord:
    """The record also says which part of the output error is left."""
    path, options = context.path("student"), context.stage
    assert isinstance(options, CalibratedStage)
    with context.run.publish(path) as folder:
        save_student(folder, model, tokenizer, provenance=provenance(context.config, stage=context.name))
    linears = [name for name, module in model.named_modules()
               if isinstance(module, QuantLinear) and module.spec is not None
               and not _matches(name, options.exclude)]  # fmt: skip
    before, after = errors
    left = round(after / before, 4) if before else 1.0
    return context.record({"student": path, role: path}, linears=len(linears), error_left=left)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def whole_moments(linear: QuantLinear) -> Moments:
    """Empty second moments of all inputs of a linear together."""
    return Moments(linear.in_features, linear.in_features, device=linear.weight.device)
