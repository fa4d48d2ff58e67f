"""`--plan` is arithmetic: its figures are those of real tensors, and what cannot fit the models is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from bitdistill_ray import recipe
from bitdistill_ray.config import Config, Dtype
from bitdistill_ray.core import Payload
from bitdistill_ray.errors import ConfigError
from bitdistill_ray.packed.weight import pack
from bitdistill_ray.plan import GIB, describe, preflight, steps
from bitdistill_ray.quant import quantize
from bitdistill_ray.stage_config import DistillStage
from bitdistill_ray.teacher import wire
from bitdistill_ray.teacher.actor import Teacher
from bitdistill_ray.teacher.request import SignalRequest
from tests.test_shape import LLAMA2_7B
from tests.tiny_models import packed_batch, save_tiny, tiny_model


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("teacher"), "llama")


def tiny(teacher: Path, *overrides: str) -> Config:
    return recipe.load("demo", [f"model.teacher={teacher}", "quant.group_size=16", *overrides])


def number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    assert found, text
    return float(found[1].replace(",", ""))


@pytest.mark.parametrize("fmt", ["nf3", "ternary", "lsq3"])
def test_the_bits_of_a_weight_are_those_of_the_packed_bytes(fmt: str, teacher: Path) -> None:
    config = tiny(teacher, f"quant.format={fmt}")
    linears = [m for n, m in tiny_model("llama").named_modules() if isinstance(m, nn.Linear) and "lm_head" not in n]
    alpha = torch.ones
    stored = 0
    for linear in linears:
        rows, columns = linear.weight.shape
        scales = alpha(rows, columns // 16) if config.quant.spec.format.learns_scale else None
        weight = pack(quantize(linear.weight, config.quant.spec, alpha=scales))
        stored += weight.codes.nbytes + weight.scales.nbytes
    bits = 8 * stored / sum(linear.weight.numel() for linear in linears)
    assert number(r"linears alone ([\d.]+) bits/weight", describe(config)) == pytest.approx(bits, abs=5e-4)


@pytest.mark.parametrize(
    ("payload", "relation"),
    [("hidden", False), ("hidden", True), ("topk", False), ("sampled", False), ("logits", True)],
)
def test_the_bytes_of_the_wire_are_those_of_an_answer(payload: str, relation: bool, teacher: Path) -> None:
    overrides = [f"teacher.payload={payload}", "teacher.topk=5", "teacher.samples=7"]
    if payload == "sampled":
        overrides.append("stages.distill.loss={cakld: 0, forward_kl: 1}")
    if relation:
        overrides.append("stages.distill.loss={cakld: 1, relation: {weight: 1, heads: 8, layer: 1}, "
                         "states: {weight: 1, layers: [0, 1]}}")  # fmt: skip
    planned = number(r"teacher wire ([\d,]+) bytes/token", describe(tiny(teacher, *overrides)))
    request = SignalRequest(payload=Payload(payload), topk=5, samples=7, attention_layer=1 if relation else None,
                            states_layers=(0, 1) if relation else ())  # fmt: skip
    batch = packed_batch([[9, 7], [12]], 16)
    answer = Teacher(str(teacher), dtype=Dtype.BF16, threads=1).score(wire.encode_batch(batch), request)
    assert planned * batch.ids_BT.numel() == wire.payload_bytes(answer)


def test_a_paper_sized_plan(tmp_path: Path) -> None:
    """Llama-2-7B from its config.json alone: sizes, steps and memory worked out by hand."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA2_7B), encoding="utf-8")
    text = describe(recipe.load("bitdistiller-int2-llama2-7b", [f"model.teacher={tmp_path}"]))
    linear, embedding = 6_476_005_376, 262_144_000
    assert number(r"student +llama ([\d.]+) M", text) == pytest.approx((linear + embedding) / 1e6, abs=0.05)
    # 2-bit codes, an fp16 scale and a 2-bit zero point for every 128 weights
    bits = 2 + 18 / 128
    assert number(r"linears alone ([\d.]+) bits/weight", text) == pytest.approx(bits, abs=1e-3)
    packed = linear * bits / 8 + 2 * embedding
    assert number(r"in 16 bits -> ([\d.]+) GiB packed", text) == pytest.approx(packed / GIB, abs=1e-3)
    # bf16 weights whole; bf16 gradients, fp32 master and two moments over four workers (ZeRO-2)
    memory = (linear + embedding) * (2 + 2 / 4 + 12 / 4) / GIB
    assert number(r"ZeRO-2, ([\d.]+) GiB", text) == pytest.approx(memory, abs=0.01)
    assert "26,214,400 tokens in 200 steps of 128 x 1024" in text
    assert "teacher wire 8,192 bytes/token (hidden)" in text


@pytest.mark.parametrize(
    ("tokens", "batch", "length", "expected"),
    [(1000, 10, 10, 10), (1049, 10, 10, 10), (1051, 10, 10, 11), (1, 10, 10, 1)],
)
def test_a_token_budget_buys_whole_steps(tokens: int, batch: int, length: int, expected: int) -> None:
    assert steps(DistillStage(tokens=tokens, batch_sequences=batch), length) == expected


def test_what_has_no_effect_is_warned_of(teacher: Path) -> None:
    lines = describe(tiny(teacher, "stages.distill.loss={cakld: 0, ce: 1, temperature: 5}"))
    assert "warning: stages.distill.loss.temperature: no effect without a KL" in lines
    assert "warning" not in describe(tiny(teacher, "stages.distill.loss.temperature=5"))


RELATION = "stages.distill.loss={{cakld: 1, relation: {{weight: 1, heads: {heads}, layer: {layer}}}}}"


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (
            "quant.group_size=64",
            "quant.group_size: 64 is more than the 32 inputs of q_proj. Set quant.group_size",
        ),
        (RELATION.format(heads=8, layer=2), "stages.distill.loss.relation.layer: 2 of a teacher with 2 layers. Give a"),
        (RELATION.format(heads=8, layer=-3), "stages.distill.loss.relation.layer: -3 of a teacher with 2 layers"),
        (
            RELATION.format(heads=32, layer=1),
            "stages.distill.loss.relation.heads: 32 does not divide the width 16 of Q, K or V. Give a divisor of it, "
            "such as 16",
        ),
        (
            "stages.distill.loss={cakld: 1, relation: {weight: 1, heads: 8, layer: 0, student_layer: 2}}",
            "stages.distill.loss.relation.student_layer: 2 of a student with 2 layers. Give a layer from -2 to 1",
        ),
        (
            "stages.distill.loss={cakld: 1, states: {weight: 1, layers: [0, 2]}}",
            "stages.distill.loss.states.layers: 2 of a teacher with 2 layers. Give a layer from -2 to 1",
        ),
        (
            "stages.distill={tokens: 1, quant_warmup_steps: 1}",
            "stages.distill.quant_warmup_steps: 1 of 1 steps, so that no step would see what is exported. Give fewer",
        ),
        ("teacher={payload: topk, topk: 321}", "teacher.topk: 321 of a vocabulary of 320. Set teacher.topk to at most"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(override: str, line: str, teacher: Path) -> None:
    with pytest.raises(ConfigError) as refusal:
        preflight(tiny(teacher, override))
    assert str(refusal.value).startswith(line)


def test_models_of_other_vocabularies_are_refused(teacher: Path, tmp_path: Path) -> None:
    student = save_tiny(tmp_path / "student", "qwen3", vocab_size=352)
    with pytest.raises(ConfigError, match=r"model\.student: has 352 tokens, the teacher 320\. Choose two models"):
        preflight(tiny(teacher, f"model.student={student}"))


def test_models_of_other_widths_have_no_states_to_compare(teacher: Path, tmp_path: Path) -> None:
    student = save_tiny(tmp_path / "student", "llama", hidden_size=64)
    states = "stages.distill.loss={cakld: 1, states: {weight: 1}}"
    with pytest.raises(ConfigError, match=r"loss\.states: a teacher of width 32, a student of 64"):
        preflight(tiny(teacher, f"model.student={student}", states))
    preflight(tiny(teacher, states))


def test_models_of_other_heads_need_a_number_of_relation_heads(teacher: Path, tmp_path: Path) -> None:
    student = save_tiny(tmp_path / "student", "llama", num_attention_heads=2)
    config = tiny(teacher, f"model.student={student}", RELATION.format(heads="null", layer=1))
    with pytest.raises(ConfigError, match=r"relation\.heads: empty, and the models have different heads"):
        preflight(config)
    preflight(tiny(teacher, RELATION.format(heads="null", layer=-1)))
