"""Scaling channels leaves the model's function as it was, in every family and with SubLN."""

from __future__ import annotations

import pytest
import torch

from bitdistill_ray.core import Format, Granularity, QuantSpec
from bitdistill_ray.model.acceleration import decoder_layers
from bitdistill_ray.model.channels import scalable_channels
from bitdistill_ray.model.surgery import SubLN, insert_subln
from bitdistill_ray.quant import Moments, fake_quantize, search_scales
from tests.tiny_models import EVERY_CASE, tiny_model

IDS = torch.arange(4, 24)[None]
INT2 = QuantSpec(format=Format.INT2, granularity=Granularity.GROUP, group_size=16)


@pytest.mark.parametrize("case", EVERY_CASE)
def test_the_function_stays(case: str) -> None:
    model = tiny_model(case)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        expected = model(IDS).logits
        places = [place for layer in decoder_layers(model) for place in scalable_channels(model, layer)]
        assert len(places) == 4 * 2
        for place in places:
            s = place.tie(torch.rand(place.readers[0].in_features, generator=generator) + 0.5)
            before = place.readers[0].weight.clone()
            place.scale(s)
            assert not torch.equal(place.readers[0].weight, before)
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-3, atol=1e-4)


def test_a_linear_behind_a_subln_is_scaled_by_that_norm_alone() -> None:
    model = tiny_model("llama")
    insert_subln(model, SubLN.OUTPUTS, gain=0.7)
    with torch.no_grad():
        expected = model(IDS).logits
        for layer in decoder_layers(model):
            for place in scalable_channels(model, layer):
                place.scale(place.tie(torch.linspace(0.5, 2.0, place.readers[0].in_features)))
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-3, atol=1e-4)


def test_scales_that_are_found_bring_the_outputs_nearer() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(500, 64, generator=g)
    x[:, ::9] *= 20.0  # a few channels that carry much
    moments = Moments(64, 64)
    moments.add(x)
    weights = [torch.randn(32, 64, generator=g), torch.randn(16, 64, generator=g)]
    s, before, after = search_scales([(w, INT2) for w in weights], moments.mean("x"))

    def error(scale: torch.Tensor) -> float:
        return sum(float((x @ (w - fake_quantize(w * scale, INT2) / scale).T).square().sum(-1).mean()) for w in weights)

    assert before == pytest.approx(error(torch.ones(64)), rel=1e-3)
    assert after == pytest.approx(error(s), rel=1e-3)
    assert after < 0.7 * before
    assert s[::9].min() > s[1::9].max()


def test_without_need_nothing_is_scaled() -> None:
    """Inputs of one size give exponents nothing to work with."""
    w, gram = torch.randn(8, 32), torch.eye(32)
    s, before, after = search_scales([(w, INT2)], gram)
    assert torch.equal(s, torch.ones(32))
    assert before == after
