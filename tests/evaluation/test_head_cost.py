"""The cost of packed tables is what evaluation finds between the latent and the packed student."""

from pathlib import Path

import pytest

from bitdistill_ray.core import Format, QuantSpec
from bitdistill_ray.evaluation.head_cost import CONTEXT, TOKENS, head_cost
from bitdistill_ray.evaluation.language import measure, windows
from bitdistill_ray.evaluation.suite import excerpt
from bitdistill_ray.model.student import load_student, save_student, saved_dtype
from bitdistill_ray.model.surgery import quantize_linears
from bitdistill_ray.packed.export import pack_student
from bitdistill_ray.packed.model import load_packed_model
from bitdistill_ray.packed.tables import HeadBits
from tests.tiny_models import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_model("llama")
    quantize_linears(model, QuantSpec(format=Format.INT2, group_size=16))
    folder = tmp_path_factory.mktemp("head_cost") / "student"
    save_student(folder, model, tiny_tokenizer())
    return folder


@pytest.mark.parametrize("bits", [HeadBits.EIGHT, HeadBits.FOUR])
def test_it_is_what_evaluation_finds_between_both(student: Path, tmp_path: Path, bits: HeadBits) -> None:
    pack_student(student, tmp_path / "packed", {}, head_bits=bits)
    cost = head_cost(student, tmp_path / "packed")
    assert cost is not None
    latent, tokenizer = load_student(student, dtype=saved_dtype(student))
    packed, _ = load_packed_model(tmp_path / "packed", kernels=False)
    found = measure(packed, latent, windows(excerpt(), tokenizer, context=CONTEXT, max_tokens=TOKENS), name="x")
    alone = measure(latent, latent, windows(excerpt(), tokenizer, context=CONTEXT, max_tokens=TOKENS), name="x")
    assert cost.perplexity == pytest.approx(found["ppl:x"].value, rel=1e-3)  # norms are packed in 16 bits
    assert cost.perplexity_16 == pytest.approx(alone["ppl:x"].value, rel=1e-5)
    assert cost.kl == pytest.approx(found["kl:x"].value, rel=2e-2)
    assert cost.kl > 0
    weights = latent.get_input_embeddings().weight.numel()
    assert cost.bytes_16 == 2 * weights
    assert 0.9 * bits / 16 < cost.bytes / cost.bytes_16 < 1.5 * bits / 16
    assert f"KL {cost.kl:.4f}" in str(cost)


def test_there_is_none_in_16_bits(student: Path, tmp_path: Path) -> None:
    pack_student(student, tmp_path / "packed", {})
    assert head_cost(student, tmp_path / "packed") is None
