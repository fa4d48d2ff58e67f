"""The mean of the last steps' weights: which steps count, and that it goes on from a checkpoint."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

from bitdistill_ray.errors import ConfigError
from bitdistill_ray.student.averaging import WeightAverage
from tests.test_config import check, tree


def trained(average: WeightAverage, model: nn.Linear, steps: range) -> None:
    for done in steps:
        nn.init.constant_(model.weight, float(done))
        average.add(done)


@pytest.mark.parametrize(
    ("steps", "share", "mean"),
    [(10, 0.3, 9.0), (10, 0.01, 10.0), (3, 0.9, 2.0), (1, 0.5, 1.0)],  # at least the last one
)
def test_the_last_share_of_the_steps_counts(steps: int, share: float, mean: float) -> None:
    model = nn.Linear(3, 2, bias=False)
    average = WeightAverage(model, steps=steps, share=share)
    trained(average, model, range(1, steps + 1))
    assert average.tensors()["weight"].unique().tolist() == [mean]


def test_a_mean_of_bf16_weights_is_finer_than_they_are_until_it_is_given_out() -> None:
    model = nn.Linear(1, 1, bias=False).bfloat16()
    average = WeightAverage(model, steps=256, share=0.999)
    for done in range(1, 257):
        nn.init.constant_(model.weight, 1.0 if done % 2 else 1.0078125)  # neighbours in bf16
        average.add(done)
    assert average.state()["sums"]["weight"].item() == 128 * (1.0 + 1.0078125)
    assert average.tensors()["weight"].dtype is torch.bfloat16


def test_it_goes_on_from_a_checkpoint() -> None:
    model = nn.Linear(3, 2, bias=False)
    whole, cut = (WeightAverage(model, steps=10, share=0.8) for _ in range(2))
    trained(whole, model, range(1, 11))
    trained(cut, model, range(1, 7))
    file = io.BytesIO()
    torch.save(cut.state(), file)
    file.seek(0)
    again = WeightAverage(model, steps=10, share=0.8)
    again.load(torch.load(file))
    trained(again, model, range(7, 11))
    assert torch.equal(again.tensors()["weight"], whole.tensors()["weight"])


def test_sharded_weights_are_refused() -> None:
    stages = {"refine": {}, "distill": {"average": 0.2}}
    with pytest.raises(ConfigError, match=r"stages\.distill\.average: 0\.2 under ZeRO-3"):
        check(tree(data="/corpus", student={"zero": 3}, stages=stages))
