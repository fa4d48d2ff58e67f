"""LossModule against the losses written out: transformers' logits, probabilities in float64, one document at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitdistill_ray.core import Format, QuantSpec, TeacherSignals
from bitdistill_ray.loss_config import LossConfig
from bitdistill_ray.losses.reduction import Totals
from bitdistill_ray.model.heads import LMHead
from bitdistill_ray.model.surgery import quantize_linears
from bitdistill_ray.model.taps import attention_taps
from bitdistill_ray.student.module import LossModule
from bitdistill_ray.student.objective import objective_of
from bitdistill_ray.teacher.scorer import scored
from tests.tiny_models import EVERY_CASE, packed_batch, tiny_model

BATCH = packed_batch([[9, 5], [12]], 16)
DOCUMENTS = [(0, slice(0, 9)), (0, slice(9, 14)), (1, slice(0, 12))]
GAMMA = 0.3
SPEC = QuantSpec(format=Format.INT3, group_size=16)


def student_of(case: str) -> nn.Module:
    model = tiny_model(case, seed=1)
    quantize_linears(model, SPEC)
    return model


@torch.no_grad()
def said_by(teacher: nn.Module, *, layer: int | None = None, states: tuple[int, ...] = ()) -> TeacherSignals:
    found = scored(teacher, BATCH, layer, states)
    return TeacherSignals(sequence_ids=BATCH.sequence_ids, hidden_BTD=found.hidden_BTD, attention=found.attention,
                          states=found.states)  # fmt: skip


def probabilities(model: nn.Module, tau: float) -> Tensor:
    """float64 [tokens with a label, V], one document at a time."""
    rows = [model(input_ids=BATCH.ids_BT[row, at][None]).logits[0, :-1] for row, at in DOCUMENTS]
    return (torch.cat(rows).double() / tau).softmax(-1)


def by_hand(student: nn.Module, teacher: nn.Module) -> dict[str, Tensor]:
    labels = torch.cat([BATCH.ids_BT[row, at][1:] for row, at in DOCUMENTS])
    s, (s_2, t_2) = probabilities(student, 1), (probabilities(m, 2) for m in (student, teacher))
    with torch.no_grad():
        t = probabilities(teacher, 1)
    forward, reverse = (t * (t / s).log()).sum(-1).mean(), (s * (s / t).log()).sum(-1).mean()
    return {
        "ce": -s[torch.arange(len(labels)), labels].log().mean(),
        "forward_kl": forward,
        "cakld": GAMMA * reverse + (1 - GAMMA) * forward,
        "forward_kl@2": 4 * (t_2.detach() * (t_2.detach() / s_2).log()).sum(-1).mean(),
    }


def run(student: nn.Module, teacher: nn.Module, loss: dict[str, Any], **more: Any) -> tuple[Tensor, dict[str, Tensor]]:
    module = LossModule(
        student,
        objective_of(LossConfig.model_validate(loss)),
        chunk_tokens=5,
        teacher_head=LMHead(teacher).frozen_copy(),
        **more,
    )
    totals = Totals.count(BATCH.labels_BT, BATCH.segment_BT)
    value, parts = module(
        BATCH, said_by(teacher, layer=more.get("relation_layer"), states=more.get("states_layers", ())), totals
    )
    return value, parts


Weighted = tuple[dict[str, Any], dict[str, float]]
LOSSES: tuple[Weighted, ...] = (
    ({"ce": 1.0}, {"ce": 1.0}),
    ({"cakld": 2.0}, {"cakld": 2.0}),
    ({"forward_kl": 3.0, "temperature": 2.0, "temperature_squared": True}, {"forward_kl@2": 3.0}),
)
BOTH: Weighted = ({"ce": 1.0, "forward_kl": 10.0}, {"ce": 1.0, "forward_kl": 10.0})


@pytest.mark.parametrize(
    ("case", "loss", "weights"), [*(("llama", *w) for w in LOSSES), *((case, *BOTH) for case in EVERY_CASE)]
)
def test_value_and_gradients_are_those_written_out(case: str, loss: dict[str, Any], weights: dict[str, float]) -> None:
    student, teacher = student_of(case), tiny_model(case)
    value, parts = run(student, teacher, loss, gamma=GAMMA)
    value.backward()
    found = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad(set_to_none=True)

    expected = by_hand(student, teacher)
    total = sum(weight * expected[name] for name, weight in weights.items())
    assert isinstance(total, Tensor)
    total.backward()
    assert {name: part.item() for name, part in parts.items()} == pytest.approx(
        {name: expected[name].item() for name in weights}, rel=1e-4
    )
    assert value.item() == pytest.approx(total.item(), rel=1e-4)
    assert found
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=2e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def relation_by_hand(student: nn.Module, teacher: nn.Module, layer: int, heads: int) -> float:
    """Algorithm 1 of BitNet Distillation, divided by the heads as in the authors' code; float64."""
    total, rows = 0.0, sum(at.stop - at.start for _, at in DOCUMENTS)
    for row, at in DOCUMENTS:
        relations = []
        for model in (teacher, student):
            with torch.no_grad(), attention_taps(model, (layer,)) as taps:
                model(input_ids=BATCH.ids_BT[row, at][None])
            states = (taps[layer].q_BHTC, taps[layer].k_BJTC, taps[layer].v_BJTC)
            merged = [
                s[0].double().transpose(0, 1).flatten(1).unflatten(1, (heads, -1)).transpose(0, 1) for s in states
            ]
            unit = [m / m.norm(dim=-1, keepdim=True) for m in merged]
            relations.append([(u @ u.transpose(1, 2)).softmax(-1) for u in unit])
        total += sum(float((t * (t / s).log()).sum()) for t, s in zip(*relations, strict=True))
    return total / rows / heads / heads


@pytest.mark.parametrize("case", ["llama", "qwen3"])
def test_relations_of_one_layer_join_the_loss(case: str) -> None:
    student, teacher = student_of(case), tiny_model(case)
    loss = {"ce": 1.0, "relation": {"weight": 60.0, "heads": 8}}
    value, parts = run(student, teacher, loss, relation_layer=1)
    expected = relation_by_hand(student, teacher, 1, 8)
    assert parts["relation"].item() == pytest.approx(expected, rel=1e-3)
    assert value.item() == pytest.approx(parts["ce"].item() + 60 * parts["relation"].item(), rel=1e-5)
    value.backward()
    assert student.get_submodule("model.layers.1.self_attn.q_proj").weight.grad is not None


def states_by_hand(student: nn.Module, teacher: nn.Module, layers: tuple[int, ...]) -> Tensor:
    """2 (1 - cosine) of what transformers calls hidden states, one document at a time; float64."""
    values = []
    for row, at in DOCUMENTS:
        both = [m(input_ids=BATCH.ids_BT[row, at][None], output_hidden_states=True).hidden_states
                for m in (student, teacher)]  # fmt: skip
        for layer in layers:  # number 0 is the embedding
            values.append(2 - 2 * torch.cosine_similarity(*(states[layer + 1][0].double() for states in both), dim=-1))
    return torch.cat(values).mean()


@pytest.mark.parametrize("case", EVERY_CASE)
def test_states_of_layers_join_the_loss_with_their_gradient(case: str) -> None:
    student, teacher = student_of(case), tiny_model(case)
    loss = {"forward_kl": 1.0, "states": {"weight": 10.0}}
    value, parts = run(student, teacher, loss, states_layers=(0,))
    expected = states_by_hand(student, teacher, (0,))
    assert parts["states"].item() == pytest.approx(expected.item(), rel=1e-4)
    assert value.item() == pytest.approx(parts["forward_kl"].item() + 10 * parts["states"].item(), rel=1e-5)
    alone, _ = run(student, teacher, {"states": {"weight": 10.0}}, states_layers=(0,))
    weight = student.get_submodule("model.layers.0.mlp.down_proj").weight
    (by_states,) = torch.autograd.grad(alone, [weight])
    (by_formula,) = torch.autograd.grad(10 * expected, [weight])
    torch.testing.assert_close(by_states, by_formula, rtol=2e-3, atol=1e-5 * float(by_formula.abs().max()))


def test_the_teachers_head_is_no_parameter_of_the_students() -> None:
    student, teacher = student_of("llama-untied"), tiny_model("llama-untied")
    module = LossModule(
        student,
        objective_of(LossConfig(forward_kl=1.0)),
        chunk_tokens=8,
        teacher_head=LMHead(teacher).frozen_copy(),
    )
    assert {id(p) for p in module.parameters()} == {id(p) for p in student.parameters()}
    assert not list(module.buffers()) or {id(b) for b in module.buffers()} == {id(b) for b in student.buffers()}
