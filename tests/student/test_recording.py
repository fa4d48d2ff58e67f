"""A recorded pass says what the pass itself says, and what is not recorded says why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from bitdistill_ray.config import StudentConfig
from bitdistill_ray.core import AttentionStates, Format, QuantSpec, TeacherSignals, TokenBatch, TopK
from bitdistill_ray.errors import ModelError
from bitdistill_ray.loss_config import LossConfig
from bitdistill_ray.losses.reduction import Totals
from bitdistill_ray.model.acceleration import accelerate
from bitdistill_ray.model.heads import LMHead
from bitdistill_ray.model.surgery import quantize_linears
from bitdistill_ray.stage_config import DistillStage
from bitdistill_ray.student.course import Course
from bitdistill_ray.student.layout import LongParameters, OwnParameters
from bitdistill_ray.student.module import LossModule
from bitdistill_ray.student.objective import objective_of
from bitdistill_ray.student.recording import Recording, can_record, tensors_of, with_tensors
from bitdistill_ray.teacher.scorer import scored
from tests.tiny_models import EVERY_CASE, packed_batch, tiny_model

GPU = torch.device("cuda", 0)
LENGTH = 128  # a block of flex_attention's
ROWS = ([[90, 30], [128]], [[128], [128]], [[30], [70, 7]])
BATCHES = [packed_batch(rows, LENGTH, seed=seed) for seed, rows in enumerate(ROWS)]
LOSSES: dict[str, dict[str, Any]] = {
    "ce": {"ce": 1.0},
    "kl": {"forward_kl": 1.0},
    "cakld": {"cakld": 1.0, "ce": 0.5},
    "per-token": {"cakld": 1.0, "gamma": "per-token"},
    "jsd": {"jsd": 1.0},
    "relation": {"forward_kl": 1.0, "relation": {"weight": 1.0, "layer": 0, "heads": 4}},
    "states": {"forward_kl": 1.0, "states": {"weight": 10.0, "layers": [0, 1]}},
    "course": {"ce": 1.0, "relation": {"weight": {"every": 2}, "layer": 0, "heads": 4}},
}


def test_the_tensors_of_a_noun_are_taken_out_and_put_back() -> None:
    topk = TopK(ids_BTS=torch.zeros(1), logprobs_BTS=torch.ones(1))
    states = AttentionStates(layer=3, q_BHTC=torch.full((1,), 2.0), k_BJTC=torch.full((1,), 3.0), v_BJTC=torch.ones(2))
    signals = TeacherSignals(sequence_ids=("a",), topk=topk, attention=states)
    tensors = tensors_of(signals)
    assert [float(t.sum()) for t in tensors] == [0, 1, 2, 3, 2]
    other = with_tensors(signals, [t + 10 for t in tensors])
    assert (other.sequence_ids, other.attention.layer, other.hidden_BTD) == (("a",), 3, None)
    assert [float(t[0]) for t in tensors_of(other)] == [10, 11, 12, 13, 11]
    assert tensors_of(None) == []
    assert with_tensors(None, []) is None


@pytest.mark.parametrize(
    ("student", "dtype", "device", "why"),
    [
        ({}, torch.bfloat16, "cpu", "no GPU"),
        ({"cuda_graph": False}, torch.bfloat16, "cuda", "cuda_graph"),
        ({"zero": 3}, torch.bfloat16, "cuda", "ZeRO-3"),
        ({}, torch.float16, "cuda", "loss scale"),
        ({"gradient_checkpointing": True}, torch.bfloat16, "cuda", "checkpointing"),
    ],
)
def test_what_is_not_recorded_says_why(student: dict[str, Any], dtype: torch.dtype, device: str, why: str) -> None:
    recorded, said = can_record(StudentConfig(**student), dtype, torch.device(device))
    assert not recorded
    assert why in said


def test_a_gpu_student_is_recorded() -> None:
    assert can_record(StudentConfig(), torch.bfloat16, GPU)[0]
    recorded, why = can_record(StudentConfig(), torch.bfloat16, GPU, attention="sdpa")
    assert not recorded
    assert "sdpa" in why


def student_on_gpu(case: str, loss: dict[str, Any]) -> tuple[LossModule, nn.Module]:
    teacher, model = (tiny_model(case, seed=seed, hidden_size=64) for seed in (0, 1))
    quantize_linears(model, QuantSpec(format=Format.INT2, group_size=16))
    teacher.to(GPU, torch.bfloat16)
    model.to(GPU, torch.bfloat16).train()
    layer = 0 if "relation" in loss else None
    states = (0, 1) if "states" in loss else ()
    accelerate(model, GPU, length=LENGTH, tapped=() if layer is None else (layer,))
    head = LMHead(teacher).frozen_copy()
    module = LossModule(model, objective_of(LossConfig.model_validate(loss)), chunk_tokens=100, teacher_head=head,
                        gamma=0.3, relation_layer=layer, states_layers=states)  # fmt: skip
    return module, teacher


def course_of(module: LossModule, loss: dict[str, Any]) -> Course:
    """With a quantisation that begins little by little, where the weight of relations is adaptive."""
    adaptive = isinstance(loss.get("relation", {}).get("weight"), dict)
    stage = DistillStage(loss=LossConfig.model_validate(loss), quant_warmup_steps=2 if adaptive else 0)
    return Course(module, stage, ranks=1, device=GPU)


@torch.no_grad()
def said(teacher: nn.Module, batch: TokenBatch) -> TeacherSignals:
    found = scored(teacher, batch, 0, (0, 1))
    return TeacherSignals(sequence_ids=batch.sequence_ids, hidden_BTD=found.hidden_BTD, attention=found.attention,
                          states=found.states)  # fmt: skip


@pytest.mark.skipif(not torch.cuda.is_available(), reason="records on a GPU")
@pytest.mark.parametrize("long", [False, True], ids=["own", "long"])
@pytest.mark.parametrize(
    ("case", "loss"), [*(("llama", loss) for loss in LOSSES), *((case, "kl") for case in EVERY_CASE if case != "llama")]
)
def test_a_replay_gives_loss_and_gradients_of_the_pass(case: str, loss: str, *, long: bool) -> None:
    torch._dynamo.reset()
    module, teacher = student_on_gpu(case, LOSSES[loss])
    layout = LongParameters(module, GPU) if long else OwnParameters(module)
    recording, course = Recording(module, layout), course_of(module, LOSSES[loss])
    for step, batch in enumerate(BATCHES):
        batch = batch.to(GPU)
        signals, totals = said(teacher, batch), Totals.count(batch.labels_BT, batch.segment_BT)
        course.begin(step)  # what it changes, the recording reads where it is
        course.micro(batch, signals, totals)
        found = []
        for run in (recording, module.loss):
            leaves = layout.leaves() if run is recording else list(module.parameters())
            for leaf in leaves:
                leaf.grad = None
            value, parts = run(batch, signals, totals)
            (value / 3).backward()
            named = layout.named if run is recording else OwnParameters(module).named
            found.append((value, parts, named([leaf.grad for leaf in leaves])))
        (value, parts, grads), (own_value, own_parts, own_grads) = found
        torch.testing.assert_close(value, own_value, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(parts, own_parts, rtol=1e-5, atol=1e-6)
        assert set(grads) == set(own_grads)
        for name, grad in own_grads.items():
            torch.testing.assert_close(grads[name], grad, rtol=2e-2, atol=2e-2 * float(grad.abs().max()), msg=name)
            assert grad.abs().max() > 0, name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="records on a GPU")
def test_a_micro_batch_of_another_shape_is_refused() -> None:
    module, _ = student_on_gpu("llama", LOSSES["ce"])
    recording = Recording(module)
    for length in (LENGTH, 2 * LENGTH):
        batch = packed_batch([[9]], length).to(GPU)
        call = lambda: recording(batch, None, Totals.count(batch.labels_BT, batch.segment_BT))  # noqa: B023, E731
        if length == LENGTH:
            call()
            continue
        with pytest.raises(ModelError, match="cuda_graph"):
            call()
