"""The strength of the quantisation over the steps, and what a student under it computes."""

from __future__ import annotations

import torch
from torch import nn

from bitdistill_ray.core import Format, Granularity, QuantSpec
from bitdistill_ray.loss_config import LossConfig
from bitdistill_ray.model.forward import hidden_states
from bitdistill_ray.model.surgery import SubLN, insert_subln, quantize_linears
from bitdistill_ray.stage_config import DistillStage, FinetuneStage, PretrainStage, TrainStage
from bitdistill_ray.student.course import STRENGTH, Course
from bitdistill_ray.student.module import LossModule
from bitdistill_ray.student.objective import objective_of
from tests.tiny_models import packed_batch, tiny_model

BATCH = packed_batch([[9, 5], [12]], 16)
SPEC = QuantSpec(format=Format.TERNARY, granularity=Granularity.TENSOR, group_size=None, activation_bits=8)


def student(*, quantised: bool = True) -> nn.Module:
    model = tiny_model(seed=1)
    if quantised:
        quantize_linears(model, SPEC)
    insert_subln(model, SubLN.ALL)
    return model


def course_of(model: nn.Module, stage: TrainStage) -> Course:
    module = LossModule(model, objective_of(LossConfig(ce=1.0)), chunk_tokens=8)
    return Course(module, stage, ranks=1, device=torch.device("cpu"))


@torch.no_grad()
def test_a_student_is_led_from_its_latent_weights_to_its_codes() -> None:
    """Bit for bit at both ends: what is trained in the last step is what is exported."""
    model, stage = student(), PretrainStage(quant_warmup_steps=4)
    course = course_of(model, stage)
    plain, coded = (hidden_states(m, BATCH) for m in (student(quantised=False), student()))
    away, strengths = list[float](), list[float]()
    for step in range(7):
        course.begin(step)
        found = hidden_states(model, BATCH)
        away.append(float((found - coded).norm()))
        strengths.append(float(course.figures()[STRENGTH]))
        assert torch.equal(found, plain) == (step == 0)
        assert torch.equal(found, coded) == (step >= 4)
    assert strengths == [0, 0.25, 0.5, 0.75, 1, 1, 1]
    assert away[0] > away[2] > away[4] == 0
    course.begin(2)  # a resumed run knows its step's number, and no more
    assert float(course.figures()[STRENGTH]) == 0.5


def test_without_the_option_nothing_is_there() -> None:
    for stage in (DistillStage(), FinetuneStage()):
        course = course_of(student(), stage)
        course.begin(0)
        assert course.figures() == course.state() == {}
