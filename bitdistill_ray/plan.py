"""What a recipe would do, before anything starts: `--plan`'s text, and the checks that need the models' shapes.

All figures are arithmetic over the configuration and the models' shapes; nothing is measured here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from bitdistill_ray.config import Config, TeacherConfig
from bitdistill_ray.core import Granularity, Payload
from bitdistill_ray.errors import ConfigError
from bitdistill_ray.loss_config import LossConfig
from bitdistill_ray.recipe import dump
from bitdistill_ray.runs import storage_opener
from bitdistill_ray.shape import ModelShape, read_shape
from bitdistill_ray.stage_config import SearchStage, StudentStage, TrainStage

GIB = 2**30
H100_BF16 = 800e12  # dense bf16 FLOP/s that a large product reaches
ASSUMED_MFU = 0.4


def preflight(config: Config) -> tuple[ModelShape, ModelShape]:
    """Check the configuration against both models; returns (teacher, student) shapes.

    Raises:
        ConfigError: the vocabularies differ, a group is longer than a row, a relation layer does not exist, or the
            states of layers differ in width.
    """
    opener = storage_opener(config.storage)
    teacher = read_shape(config.model.teacher, opener)
    student = read_shape(config.model.student, opener) if config.model.student else teacher
    if teacher.vocabulary != student.vocabulary:
        raise ConfigError("model.student", f"has {student.vocabulary} tokens, the teacher {teacher.vocabulary}",
                          "Choose two models that share a tokenizer")  # fmt: skip
    size = config.quant.group_size
    if size is not None and config.quant.granularity is Granularity.GROUP:
        name, (_, inputs) = min(student.linears.items(), key=lambda item: item[1][1])
        if size > inputs:
            raise ConfigError("quant.group_size", f"{size} is more than the {inputs} inputs of {name}",
                              f"Set quant.group_size to at most {inputs}")  # fmt: skip
    if config.teacher.payload is Payload.TOPK and config.teacher.topk > teacher.vocabulary:
        raise ConfigError("teacher.topk", f"{config.teacher.topk} of a vocabulary of {teacher.vocabulary}",
                          f"Set teacher.topk to at most {teacher.vocabulary}")  # fmt: skip
    for key, stage in config.stages.items():
        if isinstance(stage, SearchStage):
            _check_layers(f"stages.{key}.layers", stage.layers, teacher)
        if not isinstance(stage, StudentStage):
            continue
        soft, count = stage.quant_warmup_steps, steps(stage, config.data.sequence_length)
        if soft >= count:
            raise ConfigError(f"stages.{key}.quant_warmup_steps", f"{soft} of {count} steps, so that no step would see "
                              "what is exported", "Give fewer")  # fmt: skip
        if relation := stage.loss.relation:
            _check_relation_heads(f"stages.{key}.loss.relation.heads", relation.heads, teacher, student)
            if isinstance(relation.layer, int):
                _check_layers(f"stages.{key}.loss.relation.layer", (relation.layer,), teacher)
            if relation.student_layer is not None:
                where = f"stages.{key}.loss.relation.student_layer"
                _check_layers(where, (relation.student_layer,), student, whose="student")
        if states := stage.loss.states:
            if not isinstance(states.layers, int):
                _check_layers(f"stages.{key}.loss.states.layers", states.layers, teacher)
            if teacher.hidden != student.hidden:
                raise ConfigError(f"stages.{key}.loss.states", f"a teacher of width {teacher.hidden}, a student of "
                                  f"{student.hidden}", "Use loss.relation, which compares across widths")  # fmt: skip
    return teacher, student


def _check_layers(where: str, layers: Sequence[int], model: ModelShape, *, whose: str = "teacher") -> None:
    for layer in layers:
        if not -model.layers <= layer < model.layers:
            raise ConfigError(where, f"{layer} of a {whose} with {model.layers} layers",
                              f"Give a layer from {-model.layers} to {model.layers - 1}")  # fmt: skip


def _check_relation_heads(where: str, heads: int | None, teacher: ModelShape, student: ModelShape) -> None:
    if heads is None:
        if (teacher.heads, teacher.kv_heads) != (student.heads, student.kv_heads):
            raise ConfigError(where, "empty, and the models have different heads", "Give a number of relation heads")
        return
    for shape in (teacher, student):
        for width in (shape.heads * shape.head_size, shape.kv_heads * shape.head_size):
            if width % heads:
                raise ConfigError(where, f"{heads} does not divide the width {width} of Q, K or V",
                                  f"Give a divisor of it, such as {math.gcd(heads, width)}")  # fmt: skip


def describe(config: Config) -> str:
    """The resolved configuration and what it costs."""
    teacher, student = preflight(config)
    spec = config.quant.spec
    linear_bits = sum(student.layers * n * k * spec.bits_per_weight(n, k) for n, k in student.linears.values())
    others = student.embedding_parameters * 2
    before = 2 * (student.linear_parameters + student.embedding_parameters)
    after = linear_bits / 8 + others
    lines = [
        dump(config),
        *(f"warning: {line}" for line in config.unused),
        f"teacher        {_parameters(teacher)}, {_actors(config.teacher)} x ({config.teacher.gpus:g} GPUs, "
        f"{config.teacher.cpus:g} CPUs), {2 * _count(teacher) / GIB:.2f} GiB of weights each",
        f"student        {_parameters(student)}, {config.student.workers} workers x ({config.student.gpus:g} GPUs, "
        f"{config.student.cpus:g} CPUs), ZeRO-{config.student.zero}, "
        f"{_student_bytes(student, config) / GIB:.2f} GiB of weights, gradients and optimiser each",
        f"bytes          {before / GIB:.3f} GiB in 16 bits -> {after / GIB:.3f} GiB packed ({before / after:.1f} x); "
        f"linears alone {linear_bits / student.linear_parameters:.3f} bits/weight "
        f"({16 * student.linear_parameters / linear_bits:.1f} x)",
    ]
    for name, stage in config.stages.items():
        if isinstance(stage, SearchStage):
            lines.append(f"{name:14} {stage.tokens:,} tokens with each of {len(stage.layers)} layers")
        if isinstance(stage, TrainStage):
            lines.append(_training(name, stage, config, teacher, student))
    return "\n".join(lines)


def _actors(teacher: TeacherConfig) -> str:
    if teacher.join:
        return f"those of the pool {teacher.join!r}"
    elastic = "" if teacher.least == teacher.most else f" ({teacher.least} to {teacher.most})"
    return f"{teacher.actors}{elastic} actors"


def steps(stage: TrainStage, sequence_length: int) -> int:
    """Optimiser steps that a token budget pays for."""
    return max(1, round(stage.tokens / (stage.batch_sequences * sequence_length)))


def _training(name: str, stage: TrainStage, config: Config, teacher: ModelShape, student: ModelShape) -> str:
    count = steps(stage, config.data.sequence_length)
    tokens = count * stage.batch_sequences * config.data.sequence_length
    loss = getattr(stage, "loss", None)
    line = f"{name:14} {tokens:,} tokens in {count:,} steps of {stage.batch_sequences} x {config.data.sequence_length}"
    flops = 6.0 * _count(student) * tokens
    if loss is not None and loss.needs_teacher:
        wire = _wire_bytes(config, teacher, loss)
        speed = H100_BF16 * ASSUMED_MFU / (6.0 * _count(student)) * config.student.workers
        flops += 2.0 * _count(teacher) * tokens
        line += f"; teacher wire {wire:,} bytes/token ({config.teacher.payload}), " \
                f"{wire * speed / GIB:.2f} GiB/s at {speed:,.0f} tokens/s"  # fmt: skip
    gpus = max(1.0, config.student.workers * config.student.gpus)
    return f"{line}; {flops:.2e} FLOP, {flops / (H100_BF16 * ASSUMED_MFU * gpus) / 60:.1f} min on {gpus:g} H100 at 40 %"


def _wire_bytes(config: Config, teacher: ModelShape, loss: LossConfig) -> int:
    payload = {
        Payload.HIDDEN: 2 * teacher.hidden,
        Payload.LOGITS: 2 * teacher.vocabulary,
        Payload.TOPK: 6 * config.teacher.topk,
        Payload.SAMPLED: 6 * config.teacher.samples,
    }[config.teacher.payload]
    qkv = 2 * teacher.head_size * (teacher.heads + 2 * teacher.kv_heads)
    states = 2 * teacher.hidden * len(loss.states.of(teacher.layers)) if loss.states else 0
    return payload + (qkv if loss.relation else 0) + states


def _student_bytes(student: ModelShape, config: Config) -> float:
    """bf16 weights and gradients, fp32 master and two Adam moments, divided as the ZeRO stage divides them."""
    count, workers, zero = _count(student), config.student.workers, config.student.zero
    weights = 2 * count / (workers if zero >= 3 else 1)
    gradients = 2 * count / (workers if zero >= 2 else 1)
    return weights + gradients + 12 * count / (workers if zero >= 1 else 1)


def _count(shape: ModelShape) -> int:
    return shape.linear_parameters + shape.embedding_parameters


def _parameters(shape: ModelShape) -> str:
    return f"{shape.family} {_count(shape) / 1e6:.1f} M ({shape.layers} layers, hidden {shape.hidden})"
