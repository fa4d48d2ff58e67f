"""Flip rate, zeros and the terms' gradients against the same figures made by hand."""

from __future__ import annotations

import pytest
import torch

from bitdistill_ray.core import Format, QuantSpec, TeacherSignals
from bitdistill_ray.loss_config import LossConfig, RelationConfig
from bitdistill_ray.losses.reduction import Totals
from bitdistill_ray.model.forward import hidden_states
from bitdistill_ray.model.heads import LMHead
from bitdistill_ray.model.linear import QuantLinear
from bitdistill_ray.model.surgery import quantize_linears
from bitdistill_ray.model.taps import attention_taps
from bitdistill_ray.monitor_config import MonitorConfig
from bitdistill_ray.quant import dequantize, quantize
from bitdistill_ray.student.module import LossModule
from bitdistill_ray.student.objective import objective_of
from bitdistill_ray.student.probes import CodeProbe, Probes
from bitdistill_ray.student.term_gradients import gradient_norms, single_terms
from tests.tiny_models import packed_batch, tiny_model

BATCH = packed_batch([[9, 5], [12]], 16)
TOTALS = Totals.count(BATCH.labels_BT, BATCH.segment_BT)
LOSS = LossConfig(ce=0.5, relation=RelationConfig(weight=10.0, layer=1, heads=4))


def module_of(loss: LossConfig) -> LossModule:
    model = tiny_model(seed=1)
    quantize_linears(model, QuantSpec(format=Format.TERNARY, group_size=16))
    layer = loss.relation.layer if loss.relation else None
    head = LMHead(tiny_model()).frozen_copy()
    return LossModule(model, objective_of(loss), chunk_tokens=5, teacher_head=head, relation_layer=layer)


@torch.no_grad()
def signals() -> TeacherSignals:
    teacher = tiny_model()
    with attention_taps(teacher, (1,)) as taps:
        hidden_BTD = hidden_states(teacher, BATCH)
    return TeacherSignals(sequence_ids=BATCH.sequence_ids, hidden_BTD=hidden_BTD, attention=taps[1])


def linears_of(module: LossModule) -> list[QuantLinear]:
    return [m for m in module.modules() if isinstance(m, QuantLinear)]


def test_flips_and_zeros_are_counted_over_all_linears() -> None:
    module = module_of(LossConfig(ce=1.0))
    linears, probe = linears_of(module), CodeProbe(module.model)
    zeroed = sum(int((dequantize(quantize(m.weight, m.spec)) == 0).sum()) for m in linears if m.spec)
    weights = sum(m.weight.numel() for m in linears)
    units = torch.cat([(m.weight / quantize(m.weight, m.spec).scale.repeat_interleave(16, 1)).flatten()
                       for m in linears if m.spec])  # fmt: skip
    near = int(((units.abs() - 0.5).abs() <= 0.1).sum())
    first = probe.look()
    assert first == {"zeros": pytest.approx(zeroed / weights), "near_cut": pytest.approx(near / weights)}
    assert probe.look() == {"flip_rate": 0.0, **first}
    with torch.no_grad():
        linears[0].weight.neg_()  # every code but the zeros changes
    assert linears[0].spec is not None
    nonzero = int((dequantize(quantize(linears[0].weight, linears[0].spec)) != 0).sum())
    assert probe.look() == {"flip_rate": pytest.approx(nonzero / weights), **first}


def test_a_terms_norm_is_that_of_its_weighted_gradient_alone_and_training_is_left_alone() -> None:
    module = module_of(LOSS)
    objective = module.objective
    found = gradient_norms(module, single_terms(objective), BATCH, signals(), TOTALS)
    assert module.objective is objective
    assert all(p.grad is None for p in module.parameters())
    for name, alone in (("ce", LossConfig(ce=0.5)), ("relation", LossConfig(relation=LOSS.relation))):
        lone = module_of(alone)
        value, _ = lone(BATCH, signals(), TOTALS)
        value.backward()
        norm = torch.cat([p.grad.flatten() for p in lone.parameters() if p.grad is not None]).norm()
        assert found[name].item() == pytest.approx(norm.item(), rel=1e-5)


def test_probes_look_at_their_steps_and_put_their_figures_into_the_row() -> None:
    module = module_of(LOSS)
    config = MonitorConfig(codes_every=2, gradients_every=3)
    probes = Probes(module, config, rank=0, ranks=1, zero=1, steps=9, say=print)
    probes.start(1)
    rows = []
    for _ in range(5):
        probes.micro(BATCH, signals(), TOTALS)
        probes.micro(BATCH, signals(), TOTALS)
        rows.append(probes.take())
    assert [set(row) for row in rows] == [
        {"flip_rate", "flip_steps", "zeros", "near_cut"},  # after step 2
        {"grad_norm_ce", "grad_norm_relation", "grad_norm_ratio"},
        {"flip_rate", "flip_steps", "zeros", "near_cut"},
        set(),
        {"flip_rate", "flip_steps", "zeros", "near_cut", "grad_norm_ce", "grad_norm_relation", "grad_norm_ratio"},
    ]
    assert [row.get("flip_steps") for row in rows] == [1, None, 2, None, 2]
    assert rows[1]["grad_norm_ratio"] == pytest.approx(rows[1]["grad_norm_relation"] / rows[1]["grad_norm_ce"])


def test_zero_3_says_that_gradients_are_left_out() -> None:
    said: list[str] = []
    config = MonitorConfig(codes_every=0, gradients_every=1)
    probes = Probes(module_of(LOSS), config, rank=0, ranks=1, zero=3, steps=9, say=said.append)
    probes.start(0)
    probes.micro(BATCH, signals(), TOTALS)
    assert probes.take() == {}
    assert len(said) == 1
    assert "ZeRO-3" in said[0]
