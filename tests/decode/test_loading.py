"""One loader for everything that decodes, and `bitdistill generate` over it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bitdistill_ray.core import Format, QuantSpec
from bitdistill_ray.decode.generation import generate
from bitdistill_ray.decode.loading import load_for_decoding, stop_ids
from bitdistill_ray.decode.sampling import Sampling
from bitdistill_ray.decode.torch_decoder import TorchDecoder
from bitdistill_ray.errors import ModelError, PackedError
from bitdistill_ray.generate import main
from bitdistill_ray.model.linear import QuantLinear, bake
from bitdistill_ray.model.student import save_student
from bitdistill_ray.model.surgery import quantize_linears
from bitdistill_ray.packed.linear import PackedLinear
from bitdistill_ray.packed.model import export_packed
from tests.tiny_models import save_tiny, tiny_model, tiny_tokenizer

SPEC = QuantSpec(format=Format.INT2, group_size=16)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One model as a plain checkpoint, as a latent student and packed."""
    root = tmp_path_factory.mktemp("models")
    student = tiny_model("llama")
    quantize_linears(student, SPEC)
    save_student(root / "student", student, tiny_tokenizer())
    export_packed(student, tiny_tokenizer(), root / "packed", provenance={})
    save_tiny(root / "plain", "llama")
    return {kind: str(root / kind) for kind in ("plain", "student", "packed")}


def test_each_kind_loads_as_what_it_is(folders: dict[str, str]) -> None:
    modules = {kind: load_for_decoding(path)[0].model.layers[0].mlp.up_proj for kind, path in folders.items()}
    assert type(modules["plain"]) is torch.nn.Linear
    assert isinstance(modules["student"], QuantLinear)
    assert isinstance(modules["packed"], PackedLinear)


def test_a_packed_student_decodes_as_transformers_generates(folders: dict[str, str]) -> None:
    prompts = [[5, 6, 7], [30, 31, 32, 33, 34, 35, 36], [9]]
    model, _ = load_for_decoding(folders["packed"])
    decoder = TorchDecoder.load(folders["packed"], slots=2, slot_tokens=32)
    texts = generate(decoder, prompts, Sampling(temperature=0, max_tokens=9), stop_ids=())
    for prompt, text in zip(prompts, texts, strict=True):
        alone = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=9, eos_token_id=-1)
        assert list(text.ids) == alone[0, len(prompt) :].tolist()


def test_a_latent_student_writes_what_its_packed_form_writes(tmp_path: Path) -> None:
    """Trained in bf16: 200 greedy tokens are the same, and the logits within the kernels' rounding."""
    student = tiny_model("llama").to(torch.bfloat16)
    quantize_linears(student, QuantSpec(format=Format.TERNARY, group_size=16))
    save_student(tmp_path / "latent", student, tiny_tokenizer())
    export_packed(student, tiny_tokenizer(), tmp_path / "packed", provenance={})
    models = [load_for_decoding(str(tmp_path / kind))[0] for kind in ("latent", "packed")]
    prompt = torch.tensor([[5, 6, 7, 30, 31]])
    with torch.no_grad():
        logits = [model(prompt).logits for model in models]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    decoders = [TorchDecoder(model, slots=1, slot_tokens=256) for model in models]
    greedy = Sampling(temperature=0, max_tokens=200)
    texts = [generate(decoder, prompt.tolist(), greedy, stop_ids=())[0].ids for decoder in decoders]
    assert texts[0] == texts[1]
    assert len(texts[0]) == 200


def test_baking_changes_no_value_and_quantises_once() -> None:
    student = tiny_model("llama")
    quantize_linears(student, QuantSpec(format=Format.TERNARY, group_size=16))  # twice would shrink its scales
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        before = student(ids).logits
        bake(student)
        bake(student)
        assert torch.equal(student(ids).logits, before)


def test_a_damaged_packed_student_is_never_taken_for_a_plain_model(folders: dict[str, str], tmp_path: Path) -> None:
    packed = Path(folders["packed"])
    for file in packed.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_bytes(
        (packed / "config.json").read_bytes().replace(b'"bitdistill"', b'"bitdistilm"')
    )
    with pytest.raises((PackedError, ModelError)):
        load_for_decoding(str(tmp_path))


@pytest.mark.parametrize(("configured", "expected"), [(None, {0}), (7, {0, 7}), ([7, 8], {0, 7, 8})])
def test_stop_ids_join_config_and_tokenizer(configured: int | list[int] | None, expected: set[int]) -> None:
    model = tiny_model("llama")
    model.generation_config.eos_token_id = configured
    assert stop_ids(model, tiny_tokenizer()) == expected


def test_generate_prints_one_text_as_it_grows_and_several_in_order(
    folders: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--max-tokens", "12", "--temperature", "1.2", "--seed", "4"]
    assert main([folders["packed"], "--prompt", "The fox", *options]) == 0
    alone = capsys.readouterr().out
    assert main([folders["packed"], "--prompt", "The fox", "--prompt", "A teacher", *options]) == 0
    both = capsys.readouterr().out
    assert len(alone.strip()) > 0
    assert both.startswith(f"=== The fox\n{alone.rstrip(chr(10))}\n=== A teacher\n")
    assert main([folders["packed"], "--prompt", "The fox", *options[:-1], "5"]) == 0
    assert capsys.readouterr().out != alone


def test_generate_applies_the_chat_template(folders: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    message = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert main([folders["plain"], "--chat", "--prompt", "hello", "--max-tokens", "6"]) == 0
    chatted = capsys.readouterr().out
    assert main([folders["plain"], "--prompt", message, "--max-tokens", "6"]) == 0
    assert capsys.readouterr().out == chatted


def test_generate_ends_with_one_line_for_a_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nothing"), "--prompt", "x"]) == 2
    assert main([str(tmp_path), "--prompt", "x", "--top-p", "3"]) == 2
    first, second = capsys.readouterr().err.strip().splitlines()
    assert "nothing" in first
    assert "sampling.top_p: 3.0. Give a value above 0 and at most 1" in second
