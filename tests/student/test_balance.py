"""The adaptive weight of relations: what it comes to on real gradients, what it keeps, what a replay reads."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitdistill_ray.loss_config import AdaptiveWeight, LossConfig, RelationConfig
from bitdistill_ray.stage_config import DistillStage
from bitdistill_ray.student.balance import RATIO, WEIGHT, Balance
from bitdistill_ray.student.course import Course
from bitdistill_ray.student.module import LossModule
from tests.student.test_probes import BATCH, TOTALS, module_of, signals

CPU = torch.device("cpu")


def loss_of(weight: float | AdaptiveWeight) -> LossConfig:
    return LossConfig(ce=0.5, forward_kl=2.0, relation=RelationConfig(weight=weight, layer=1, heads=4))


def norm_of(module: LossModule) -> float:
    """Of the whole gradient, through the backward pass that trains."""
    module.zero_grad(set_to_none=True)
    module(BATCH, signals(), TOTALS)[0].backward()
    return float(torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]).norm())


@pytest.mark.parametrize("against", ["ce", "others"])
def test_the_relations_gradient_comes_to_the_ratio_of_the_others(against: str) -> None:
    adaptive = AdaptiveWeight.model_validate({"ratio": 0.3, "against": against})
    module = module_of(loss_of(adaptive))
    balance = Balance(module, adaptive, ranks=1, device=CPU)
    balance.begin(0)
    balance.micro(BATCH, signals(), TOTALS)
    relation = norm_of(module_of(LossConfig(relation=RelationConfig(weight=1.0, layer=1, heads=4))))
    others = norm_of(module_of(LossConfig(ce=0.5) if against == "ce" else LossConfig(ce=0.5, forward_kl=2.0)))
    weight = float(balance.figures()[WEIGHT])
    assert weight == pytest.approx(0.3 * others / relation, rel=1e-4)
    assert float(balance.figures()[RATIO]) == pytest.approx(0.3, rel=1e-5)
    value, _ = module(BATCH, signals(), TOTALS)
    fixed, _ = module_of(loss_of(weight))(BATCH, signals(), TOTALS)
    assert value.item() == pytest.approx(fixed.item(), rel=1e-6)
    assert norm_of(module) == pytest.approx(norm_of(module_of(loss_of(weight))), rel=1e-5)


def test_it_is_measured_at_its_steps_on_the_first_micro_batch_and_changed_in_place() -> None:
    """In place: a recorded pass reads the same memory ever after."""
    adaptive = AdaptiveWeight(every=3, smoothing=0.5)
    module = module_of(loss_of(adaptive))
    course = Course(module, DistillStage(loss=loss_of(adaptive)), ranks=1, device=CPU)
    balance, place = course.balance, module.relation_weight
    assert balance is not None
    seen = list[float]()
    balance.take = lambda others, relation: seen.append(float(others / relation))  # type: ignore[method-assign]
    measured = []
    for step in range(7):
        course.begin(step)
        for _ in range(2):
            course.micro(BATCH, signals(), TOTALS)
        measured.append(len(seen))
        assert module.relation_weight is place
    assert measured == [1, 1, 1, 2, 2, 2, 3]


norms = st.floats(1e-6, 1e6)
MODULE = cache(module_of)


@settings(deadline=None, max_examples=50)
@given(first=st.tuples(norms, norms), then=st.lists(st.tuples(norms, norms), max_size=4), cut=st.integers(0, 4),
       smoothing=st.floats(0, 0.95))  # fmt: skip
def test_it_is_a_mean_of_logarithms_and_goes_on_from_a_checkpoint_bit_for_bit(
    first: tuple[float, float], then: list[tuple[float, float]], cut: int, smoothing: float
) -> None:
    adaptive = AdaptiveWeight(ratio=2.0, smoothing=smoothing)
    module = MODULE(loss_of(AdaptiveWeight()))
    whole, cut_short = (Balance(module, adaptive, ranks=1, device=CPU) for _ in range(2))
    found = [(torch.tensor(others), torch.tensor(relation)) for others, relation in (first, *then)]
    for others, relation in found:
        whole.take(others, relation)
    for others, relation in found[: cut + 1]:
        cut_short.take(others, relation)
    resumed = Balance(module, adaptive, ranks=1, device=CPU)
    resumed.load(cut_short.state())
    for others, relation in found[cut + 1 :]:
        resumed.take(others, relation)
    assert resumed.state() == whole.state()
    logs = [math.log(2 * float(others) / float(relation)) for others, relation in found]
    expected = logs[0]
    for log in logs[1:]:
        expected = smoothing * expected + (1 - smoothing) * log
    assert math.log(whole.state()) == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(
    "pair", [(1.0, 0.0), (0.0, 1.0), (float("nan"), 1.0), (float("inf"), 1.0), (1.0, float("inf"))]
)
def test_a_gradient_that_says_nothing_leaves_the_weight(pair: tuple[float, float]) -> None:
    adaptive = AdaptiveWeight()
    balance = Balance(module_of(loss_of(adaptive)), adaptive, ranks=1, device=CPU)

    def scalars(a: float, b: float) -> tuple[Tensor, Tensor]:
        return torch.tensor(a), torch.tensor(b)

    balance.take(*scalars(*pair))
    assert balance.state() == 0
    balance.take(*scalars(3.0, 2.0))
    balance.take(*scalars(*pair))
    assert balance.state() == 1.5
