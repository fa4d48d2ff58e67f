"""What surgery does to a model, in every family: same Parameters, quantised forward pass, SubLN where asked for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bitdistill_ray.core import Format, Granularity, QuantSpec
from bitdistill_ray.errors import ConfigError
from bitdistill_ray.model.families import decoder_linears
from bitdistill_ray.model.forward import hidden_states
from bitdistill_ray.model.linear import QuantLinear, SubNorm
from bitdistill_ray.model.surgery import SubLN, calibrate_subln, insert_subln, quantize_linears
from bitdistill_ray.quant import dequantize, quantize, quantize_activation
from tests.tiny_models import EVERY_CASE, packed_batch, tiny_model

INT2 = QuantSpec(format=Format.INT2, group_size=16)
TERNARY = QuantSpec(format=Format.TERNARY, granularity=Granularity.TENSOR, group_size=None, activation_bits=8)
SEQ2 = QuantSpec(format=Format.SEQ2, granularity=Granularity.ROW, group_size=None)


@pytest.mark.parametrize("case", EVERY_CASE)
def test_every_projection_is_quantised_and_keeps_its_parameter(case: str) -> None:
    model = tiny_model(case)
    before = dict(model.named_parameters())
    names = quantize_linears(model, INT2)
    assert names == tuple(name for name, _ in decoder_linears(model))
    assert len(names) == 14
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in before.items()}
    assert type(model.lm_head) is nn.Linear
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == model.config.tie_word_embeddings


@pytest.mark.parametrize("spec", [INT2, TERNARY], ids=["int2", "ternary-a8"])
def test_the_forward_pass_multiplies_by_what_would_be_packed(spec: QuantSpec) -> None:
    """The quantised linear, written out: codes of the weight, int8 codes of the tokens, one product."""
    model = tiny_model("llama-untied").requires_grad_(False)
    quantize_linears(model, spec)
    linear, x_TK = model.model.layers[0].mlp.down_proj, torch.randn(7, 48)
    w_NK = dequantize(quantize(linear.weight, spec))
    if spec.activation_bits:
        q_TK, scale_T = quantize_activation(x_TK, 8)
        x_hat_TK = q_TK.float() * scale_T.reshape(7, 1)
    else:
        x_hat_TK = x_TK
    torch.testing.assert_close(linear(x_TK), x_hat_TK @ w_NK.T + linear.bias, rtol=1e-5, atol=1e-5)
    assert torch.equal(linear.quantized_weight(), w_NK)


@pytest.mark.parametrize("case", EVERY_CASE)
@pytest.mark.parametrize("spec", [INT2, TERNARY, SEQ2], ids=["int2", "ternary-a8", "seq2"])
def test_gradients_reach_every_parameter(case: str, spec: QuantSpec) -> None:
    model = tiny_model(case)
    quantize_linears(model, spec)
    insert_subln(model, SubLN.ALL)
    hidden_states(model, packed_batch([[9, 7]], 16)).square().mean().backward()
    lost = [n for n, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert lost == ([] if model.config.tie_word_embeddings else ["lm_head.weight"])
    flat = [n for n, p in model.named_parameters() if p.grad is not None and not p.grad.any()]
    assert flat == []
    assert any(name.endswith(".alpha") for name, _ in model.named_parameters()) == spec.format.learns_scale


def test_patterns_choose_by_full_name_or_leaf() -> None:
    def chosen(**patterns: tuple[str, ...]) -> list[str]:
        return [name.split(".", 2)[2] for name in quantize_linears(tiny_model("qwen3"), INT2, **patterns)]

    assert chosen(include=("q_proj",)) == ["0.self_attn.q_proj", "1.self_attn.q_proj"]
    assert chosen(include=("model.layers.1.mlp.*",)) == ["1.mlp.gate_proj", "1.mlp.up_proj", "1.mlp.down_proj"]
    assert chosen(include=("*_proj",), exclude=("model.layers.0.*", "*self_attn*")) == [
        "1.mlp.gate_proj", "1.mlp.up_proj", "1.mlp.down_proj"
    ]  # fmt: skip


def test_specs_may_differ_by_name() -> None:
    model = tiny_model("llama")
    names = quantize_linears(model, lambda name, linear: TERNARY if "mlp" in name else None)
    assert len(names) == 6
    assert all("mlp" in name for name in names)
    more = quantize_linears(model, lambda name, linear: INT2 if linear.out_features == 16 else None)
    assert {name.rpartition(".")[2] for name in more} == {"k_proj", "v_proj"}
    assert model.model.layers[0].mlp.up_proj.spec == TERNARY
    assert model.model.layers[0].self_attn.k_proj.spec == INT2
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear


def test_what_cannot_be_done_is_refused_before_anything_is_changed() -> None:
    wide = QuantSpec(format=Format.INT2, group_size=40)
    for spec, patterns, words in (
        (wide, {}, r"quant\.group_size: 40 is more than the 32 weights that model\.layers\.0\.self_attn\.q_proj"),
        (INT2, {"include": ("qproj",)}, r"quant\.include: 'qproj' matches no module"),
        (INT2, {"exclude": ("head",)}, r"quant\.exclude: 'head' matches no module"),
        (INT2, {"include": ("*",), "exclude": ()}, r"lm_head shares its weight with the embedding.*'lm_head'"),
        (INT2, {"exclude": ("*proj", "lm_head")}, "no linear is left to quantise"),
    ):
        model = tiny_model("llama")
        with pytest.raises(ConfigError, match=words):
            quantize_linears(model, spec, **patterns)
        assert not any(isinstance(module, QuantLinear) for module in model.modules())


def test_an_untied_head_may_be_quantised() -> None:
    model = tiny_model("llama-untied")
    assert quantize_linears(model, INT2, include=("lm_head",), exclude=()) == ("lm_head",)


@pytest.mark.parametrize("case", EVERY_CASE)
@pytest.mark.parametrize(
    ("placement", "leaves"),
    [
        (SubLN.NONE, set()),
        (SubLN.OUTPUTS, {"o_proj", "down_proj"}),
        (SubLN.ALL, {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
    ],
)
def test_subln_goes_in_front_of_the_right_linears(case: str, placement: SubLN, leaves: set[str]) -> None:
    model = tiny_model(case)
    names = insert_subln(model, placement)
    assert {name.rpartition(".")[2] for name in names} == leaves
    assert len(names) == 2 * len(leaves)
    sizes = {name: p.shape for name, p in model.named_parameters() if name.endswith("proj.norm.weight")}
    assert sizes == {f"{name}.norm.weight": (model.get_submodule(name).in_features,) for name in names}


def test_the_order_of_quantising_and_inserting_does_not_matter() -> None:
    batch, models = packed_batch([[12, 4]], 16), [tiny_model("qwen2"), tiny_model("qwen2")]
    quantize_linears(models[0], TERNARY)
    for model in models:
        insert_subln(model, SubLN.OUTPUTS)
    quantize_linears(models[1], TERNARY)
    assert torch.equal(hidden_states(models[0], batch), hidden_states(models[1], batch))


@given(rms=st.floats(0.1, 1e3), size=st.sampled_from([8, 32, 48]), seed=st.integers(0, 99))
def test_subln_gives_each_token_the_rms_of_its_gain(rms: float, size: int, seed: int) -> None:
    norm = SubNorm(size, eps=1e-6, dtype=torch.float32, device=torch.device("cpu"))
    x_TK = rms * torch.randn(5, size, generator=torch.Generator().manual_seed(seed))
    y_TK = norm(x_TK).detach()
    torch.testing.assert_close(y_TK.square().mean(-1).sqrt(), torch.ones(5), rtol=1e-2, atol=0)
    torch.testing.assert_close(y_TK / x_TK, (y_TK / x_TK)[:, :1].expand(5, size), rtol=1e-4, atol=0)


def test_subln_computes_in_fp32_and_answers_in_the_inputs_dtype() -> None:
    norm = SubNorm(64, eps=1e-6, dtype=torch.bfloat16, device=torch.device("cpu"))
    x_TK = (300 * torch.randn(9, 64, generator=torch.Generator().manual_seed(1))).half()  # squares overflow fp16
    expected_TK = x_TK.double() / x_TK.double().square().mean(-1, keepdim=True).add(1e-6).sqrt()
    assert norm(x_TK).dtype == torch.float16
    torch.testing.assert_close(norm(x_TK).double(), expected_TK, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("case", EVERY_CASE)
@pytest.mark.parametrize("placement", [SubLN.OUTPUTS, SubLN.ALL])
@torch.no_grad()
def test_calibrated_gains_are_the_median_rms_and_keep_the_function(case: str, placement: SubLN) -> None:
    batches = [packed_batch([[20, 9], [11]], 32, seed=seed) for seed in range(2)]
    model = tiny_model(case)
    real = torch.cat([(batch.segment_BT >= 0).flatten() for batch in batches])
    seen: list[torch.Tensor] = []
    handle = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda m, x: seen.append(x[0].flatten(0, 1)))
    before_BTD = [hidden_states(model, batch) for batch in batches]
    handle.remove()

    quantize_linears(model, INT2)
    names = insert_subln(model, placement)
    gains = calibrate_subln(model, batches)
    assert set(gains) == set(names)
    expected = torch.cat(seen)[real].square().mean(-1).sqrt().median()
    assert gains["model.layers.1.mlp.down_proj"] == pytest.approx(expected.item(), rel=1e-5)
    assert torch.equal(
        model.get_parameter("model.layers.1.mlp.down_proj.norm.weight"), torch.full((48,), expected.item())
    )

    def distance(changed: nn.Module) -> float:
        pairs = [(hidden_states(changed, batch), h) for batch, h in zip(batches, before_BTD, strict=True)]
        errors = [(a - b)[batch.segment_BT >= 0] for (a, b), batch in zip(pairs, batches, strict=True)]
        return torch.cat(errors).square().mean().item()

    calibrated, ones = tiny_model(case), tiny_model(case)
    insert_subln(calibrated, placement)
    calibrate_subln(calibrated, batches)
    insert_subln(ones, placement)
    assert distance(calibrated) < distance(ones)


def test_calibration_leaves_no_trace_but_the_gains() -> None:
    model, batch = tiny_model("llama").train(), packed_batch([[16]], 16)
    quantize_linears(model, INT2)
    insert_subln(model, SubLN.OUTPUTS)
    calibrate_subln(model, [batch])
    assert model.training
    assert all(isinstance(linear, QuantLinear) for _, linear in decoder_linears(model))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_calibration_without_a_token_is_refused() -> None:
    model = tiny_model("llama")
    insert_subln(model, SubLN.OUTPUTS)
    for batches in ([], [packed_batch([[]], 8)]):
        with pytest.raises(ConfigError, match="no token to calibrate"):
            calibrate_subln(model, batches)
