"""The whole road at a tiny size, packed and the same (`tests/cluster/test_job.py`: in object storage)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from bitdistill_ray import recipe
from bitdistill_ray.decode.generation import generate
from bitdistill_ray.decode.sampling import Sampling
from bitdistill_ray.decode.torch_decoder import TorchDecoder
from bitdistill_ray.errors import ConfigError
from bitdistill_ray.model.linear import QuantLinear
from bitdistill_ray.model.student import load_student, saved_dtype
from bitdistill_ray.packed.folder import PackedFolder
from bitdistill_ray.packed.model import load_packed_model
from bitdistill_ray.packed.weight import unpack
from bitdistill_ray.quant import dequantize, quantize
from bitdistill_ray.train import run
from tests.road import tiny_config
from tests.tiny_models import save_tiny

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Path:
    """A run of every stage of the demo."""
    root = tmp_path_factory.mktemp("road")
    run(tiny_config(root))
    return root


def test_every_stage_leaves_what_it_promises(finished: Path) -> None:
    folder = finished / "run"
    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary["stages"]) == {"write", "refine", "clip", "distill", "export", "evaluate"}
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(6))
    assert all(np.isfinite(row["loss"]) and row["grad_norm"] > 0 and row["teacher_bytes"] > 0 for row in rows)
    models = {m["name"]: m for m in json.loads((folder / "evaluation.json").read_text())["models"]}
    assert set(models) == {"teacher", "round-to-nearest", "clipped only", "trained"}
    assert models["trained"]["metrics"]["kl:written"]["value"] > 0
    provenance = PackedFolder.open(folder / "stages/export/packed").provenance
    assert provenance["recipe"]["quant"]["format"] == "nf3"


def test_packed_student_is_the_trained_student(finished: Path) -> None:
    """Codes equal bit for bit, logits within the kernels' rounding, the same greedy text over 200 tokens.

    The embedding, which is the head too, is packed in 8 bits when the student is exported: it is compared as packed.
    """
    source, packed_path = finished / "run/stages/distill/student", finished / "run/stages/export/packed"
    trained, tokenizer = load_student(source, dtype=saved_dtype(source))
    folder = PackedFolder.open(packed_path)
    linears = {n: m for n, m in trained.named_modules() if isinstance(m, QuantLinear) and m.spec is not None}
    assert {*linears, "model.embed_tokens"} == set(folder.manifest.packed)
    for name, linear in linears.items():
        live, stored = quantize(linear.weight, linear.spec, alpha=linear.alpha), unpack(folder.weight(name))
        assert torch.equal(live.codes_NK, stored.codes_NK)
        assert torch.equal(live.scale, stored.scale)
    done = json.loads((finished / "run/stages/export/done.json").read_text())
    assert 0 < done["facts"]["head_cost"]["kl"] < 0.01
    fake = trained.float()  # the same codes: bf16 values are fp32 values
    fake.get_input_embeddings().weight.data.copy_(dequantize(unpack(folder.weight("model.embed_tokens"))))
    packed, _ = load_packed_model(packed_path)
    ids = torch.tensor([tokenizer("the cat sat on the mat and looked at the rain")["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(packed(ids).logits, fake(ids).logits, rtol=1e-4, atol=1e-4)
    prompt = ids[0].tolist()
    greedy = Sampling(temperature=0, max_tokens=200)
    texts = [generate(TorchDecoder(m, slots=1, slot_tokens=256), [prompt], greedy, stop_ids=()) for m in (fake, packed)]
    assert len(texts[0][0].ids) == 200
    assert texts[0][0].ids == texts[1][0].ids


def test_a_finished_run_is_not_repeated(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {f: f.stat().st_mtime_ns for f in (finished / "run/stages").rglob("done.json")}
    run(tiny_config(finished))
    assert capsys.readouterr().out.count("finished before, skipped") == 6
    assert before == {f: f.stat().st_mtime_ns for f in (finished / "run/stages").rglob("done.json")}


def test_a_changed_recipe_is_refused_by_key(finished: Path) -> None:
    with pytest.raises(ConfigError, match=r"stages\.write\.temperature: was changed since stage 'write'"):
        run(tiny_config(finished, "stages.write.temperature=0.9"))


LARGER = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 4}


@pytest.mark.parametrize(("case", "larger"), [("qwen3", LARGER), ("gemma3", None)], ids=["qwen3-larger", "gemma3"])
def test_ternary_road_with_subln_and_relations(tmp_path: Path, case: str, larger: dict[str, int] | None) -> None:
    """BitNet Distillation on other families: SubLN, continued training, LD and AD.

    One student takes all of the road, a task of labels at its end, and learns from a wider and deeper teacher (layers
    mapped by depth and searched, heads by `relation.heads`, their weight by gradients); the other only distils, from
    its own model, whose logits are soft-capped.
    """
    corpus, rows = tmp_path / "corpus.txt", tmp_path / "task.jsonl"
    corpus.write_text("the cat sat on the mat and looked at the rain\n" * 80)
    rows.write_text("\n".join(json.dumps({"words": f"the cat number {n}", "label": n % 2}) for n in range(80)))
    task = {"path": str(rows), "template": "{words} is", "labels": [" brown", " at sea"]}
    train = {"tokens": 256, "batch_sequences": 4, **({"sources": "task"} if larger else {})}
    relation = {"weight": "adaptive" if larger else 60, "heads": 4, "layer": "search" if larger else -1}
    task_loss = {"ce": 1, "forward_kl": 10, "temperature": 5, "temperature_squared": True, "relation": relation}
    config = recipe.check(
        {
            "run": str(tmp_path / "run"),
            "model": {
                "teacher": str(save_tiny(tmp_path / "teacher", case, **(larger or {}))),
                "student": str(save_tiny(tmp_path / "student", case)) if larger else None,
            },
            "quant": {"format": "ternary", "granularity": "tensor", "group_size": None, "activation_bits": 8},
            "data": {"sources": str(corpus), "sequence_length": 32, "task": task},
            "student": {"micro_batch": 2, "threads": 1, "zero": 2},
            "teacher": {"threads": 1},
            "stages": {
                "finetune": train if larger else False,
                "refine": {"subln": "all"},
                "awq": {"steps": 4},
                "gptq": {"quantised_inputs": True},
                "pretrain": {"tokens": 256, "batch_sequences": 4, "quant_warmup_steps": 1, "loss": {"forward_kl": 1}}
                if larger
                else False,
                "search": {"layers": [0, -1], "tokens": 128} if larger else False,
                "distill": {**train, "loss": task_loss},
                "export": {},
                "evaluate": {"context": 32, "max_tokens": 128, "tasks": {"name": "t", **task}},
            },
        }
    )
    run(config)
    steps = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    last = [row for row in steps if row["stage"] == "distill"][-1]
    assert {"ce", "forward_kl@5", "relation"} <= set(last)
    assert last["relation"] > 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())["stages"]
    assert summary["awq"]["error_left"] <= 1
    assert summary["gptq"]["error_left"] < 1
    assert PackedFolder.open(tmp_path / "run/stages/export/packed").manifest.subln
    trained = next(m for m in summary["evaluate"]["evaluation"] if m["name"] == "trained")["metrics"]
    assert {"accuracy:t", "accuracy_gap:t", "agreement:t"} <= trained.keys()
    scored = json.loads((tmp_path / "run/evaluation-rows.json").read_text())["accuracy:t"]
    assert np.mean(scored["trained"]) == pytest.approx(trained["accuracy:t"]["value"])
    assert len(scored["teacher"]) == 80
    if larger:
        assert [row["quant_strength"] for row in steps if row["stage"] == "pretrain"] == [0, 1]
        assert last["relation_weight"] > 0
        trials = {layer: [r for r in steps if r["stage"] == f"search/layer-{layer}"] for layer in (0, -1)}
        found = {layer: trial[-1]["ce"] for layer, trial in trials.items()}
        assert [len(trial) for trial in trials.values()] == [1, 1]
        assert trials[0][0]["sequence_digest"] == trials[-1][0]["sequence_digest"]
        assert summary["search"]["layer"] == min(found, key=lambda layer: found[layer])
        assert not (tmp_path / "run/stages/search/layer-0/student").exists()
