"""The checkpoint that stock transformers loads: no key too many or too few, and the student's own predictions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from bitdistill_ray.core import Format, Granularity, QuantSpec
from bitdistill_ray.errors import ModelError
from bitdistill_ray.export import main
from bitdistill_ray.model.hf_bitnet import Mode, save_hf_bitnet
from bitdistill_ray.model.linear import QuantLinear
from bitdistill_ray.model.student import save_student
from bitdistill_ray.model.surgery import SubLN, insert_subln, quantize_linears
from bitdistill_ray.quant import quantize
from tests.tiny_models import EVERY_CASE, VOCAB_SIZE, tiny_model, tiny_tokenizer

SPEC = QuantSpec(format=Format.TERNARY, granularity=Granularity.TENSOR, group_size=None, activation_bits=8)
IDS = torch.randint(2, VOCAB_SIZE, (8, 48), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """transformers compiles its quantisers, which would take a minute here."""
    with torch.compiler.set_stance("force_eager"):
        yield


def student(case: str, subln: SubLN) -> Any:
    model = tiny_model(case)
    quantize_linears(model, SPEC)
    insert_subln(model, subln)
    for name, parameter in model.named_parameters():
        if name.endswith("proj.norm.weight"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.eval()


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    return model(IDS).logits.float()


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("subln", list(SubLN))
@pytest.mark.parametrize("case", [pytest.param(c, marks=[] if c == "qwen2" else pytest.mark.slow) for c in EVERY_CASE])
def test_stock_transformers_loads_it_and_predicts_the_same(case: str, subln: SubLN, mode: Mode, tmp_path: Path) -> None:
    model = student(case, subln)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    save_hf_bitnet(tmp_path / "out", model, tiny_tokenizer(), mode)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    loaded, found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32,
                                                         output_loading_info=True)  # fmt: skip
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    expected, logits = logits_of(model), logits_of(loaded.eval())
    assert (logits - expected).norm() / expected.norm() < 2e-2  # int8 activations that round to the other side
    assert (logits.argmax(-1) == expected.argmax(-1)).float().mean() > 0.98  # a random model's choices are close
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")("the cat sat", add_special_tokens=False)["input_ids"]
    assert ids == tiny_tokenizer()("the cat sat", add_special_tokens=False)["input_ids"]


def test_the_folding_itself_is_exact_without_activation_quantisation(tmp_path: Path) -> None:
    model = student("llama", SubLN.OUTPUTS)
    save_hf_bitnet(tmp_path / "out", model, tiny_tokenizer(), Mode.ONLINE)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    spec = QuantSpec(format=Format.TERNARY, granularity=Granularity.TENSOR, group_size=None)
    quantize_linears(model, spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.integrations.bitnet.ActQuant.apply", lambda x: x)
        expected = logits_of(model)
        assert (logits_of(loaded) - expected).norm() / expected.norm() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_latent_weights_give_our_codes_to_their_own_mean(dtype: torch.dtype, tmp_path: Path) -> None:
    """transformers divides by the mean magnitude as it is, we by what fp16 makes of it."""
    generator = torch.Generator().manual_seed(5)
    model = student("llama", SubLN.NONE)
    for parameter in model.parameters():
        parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.04).to(dtype)
    save_hf_bitnet(tmp_path / "out", model, tiny_tokenizer(), Mode.ONLINE)
    stored = load_file(tmp_path / "out/model.safetensors")
    for name, linear in model.named_modules():
        if not isinstance(linear, QuantLinear):
            continue
        weight, q = stored[f"{name}.weight"], quantize(linear.weight, SPEC)
        scale = 1 / weight.float().abs().mean()
        assert torch.equal((weight.float() * scale).round().clamp(-1, 1).to(torch.int8), q.codes_NK.to(torch.int8) - 1)
        assert 1 / scale == pytest.approx(q.scale.item(), rel=5e-5)
        assert (weight - linear.weight).abs().max() <= linear.weight.abs().max() / 64


def test_the_command_writes_it_and_refuses_other_formats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_student(tmp_path / "student", student("llama", SubLN.NONE), tiny_tokenizer())
    arguments = [str(tmp_path / "student"), str(tmp_path / "out"), "--format", "hf-bitnet", "--mode", "packed"]
    assert main(arguments) == 0
    assert (
        AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.quantization_config.quantization_mode == "offline"
    )
    other = tiny_model("llama")
    quantize_linears(other, QuantSpec(format=Format.INT2, group_size=16))
    save_student(tmp_path / "int2", other, tiny_tokenizer())
    capsys.readouterr()
    assert main([str(tmp_path / "int2"), str(tmp_path / "no"), "--format", "hf-bitnet"]) == 2
    assert (
        "int2, a scale for each group, 16-bit activations; transformers' BitNet is ternary" in capsys.readouterr().err
    )
    assert not (tmp_path / "no").exists()
    with pytest.raises(ModelError, match="no quantised linear"):
        save_hf_bitnet(tmp_path / "no", tiny_model("llama"), tiny_tokenizer(), Mode.ONLINE)
