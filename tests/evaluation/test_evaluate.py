"""`bitdistill evaluate`: the figures are those of direct computation, for packed, latent and plain models alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml

from bitdistill_ray.core import Format, QuantSpec
from bitdistill_ray.evaluate import main, text_config
from bitdistill_ray.evaluation.sizes import model_sizes, packed_sizes
from bitdistill_ray.model.student import load_student, save_student
from bitdistill_ray.model.surgery import quantize_linears
from bitdistill_ray.packed.export import pack_student
from bitdistill_ray.packed.folder import PackedFolder
from tests.tiny_models import SENTENCES, save_tiny, tiny_model, tiny_tokenizer

CONTEXT = 16
TEXT = "\n\n".join(SENTENCES * 4)
SPEC = QuantSpec(format=Format.INT2, group_size=24, activation_bits=8)  # 32 and 48 inputs: a ragged last group


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A teacher, its student as a training stage leaves it, and the same student packed."""
    folder = tmp_path_factory.mktemp("evaluate")
    student = tiny_model("llama")
    quantize_linears(student, SPEC)
    for parameter in student.parameters():  # packing stores the embedding and the norms in fp16
        parameter.data = parameter.data.half().float()
    save_student(folder / "student", student, tiny_tokenizer())
    pack_student(folder / "student", folder / "packed", {})
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    return {
        "teacher": save_tiny(folder / "teacher"),
        "student": folder / "student",
        "packed": folder / "packed",
        "text": folder / "text.txt",
    }


def run(models: dict[str, Path], *arguments: str | Path, names: tuple[str, ...]) -> dict[str, Any]:
    """The reports by model, out of the JSON file that the command wrote; `teacher` is the first."""
    file = models["teacher"].parent / "evaluation.json"
    command = [*(str(models[name]) for name in names), "--teacher", str(models["teacher"]), "--json", str(file)]
    command += ["--dtype", "fp32", "--device", "cpu", "--context", str(CONTEXT), *map(str, arguments)]
    assert main(command) == 0
    content = json.loads(file.read_text(encoding="utf-8"))
    assert set(content) == {"commit", "models"}
    assert [report["name"] for report in content["models"]] == ["teacher", *(str(models[name]) for name in names)]
    return dict(zip(("teacher (first)", *names), content["models"], strict=True))


def windows() -> torch.Tensor:
    ids = tiny_tokenizer()(TEXT, add_special_tokens=False)["input_ids"]
    return torch.tensor(ids[: len(ids) // CONTEXT * CONTEXT]).view(-1, CONTEXT)


@torch.no_grad()
def log_probabilities(model: Any) -> torch.Tensor:
    """fp32 [tokens, V] over all predicted tokens, by the model's own forward pass."""
    return model(windows()).logits[:, :-1].float().log_softmax(-1).flatten(0, 1)


def test_figures_equal_direct_computation(models: dict[str, Path]) -> None:
    reports = run(models, "--text", f"words={models['text']}", "--join", "", names=("student", "packed"))
    student, _ = load_student(models["student"], dtype=torch.float32)
    teacher_nV, student_nV = log_probabilities(tiny_model("llama")), log_probabilities(student)
    labels_n = windows()[:, 1:].flatten()
    expected = {
        "ppl:words": F.nll_loss(student_nV, labels_n).exp().item(),
        "kl:words": F.kl_div(student_nV, teacher_nV, log_target=True, reduction="batchmean").item(),
        "agreement:words": (student_nV.argmax(-1) == teacher_nV.argmax(-1)).float().mean().item(),
    }
    for name in ("student", "packed"):
        metrics = reports[name]["metrics"]
        assert {key: metric["value"] for key, metric in metrics.items()} == pytest.approx(expected, rel=1e-4)
        assert all(metric["low"] <= metric["value"] <= metric["high"] for metric in metrics.values())
        assert all(f"{CONTEXT} tokens" in metric["protocol"] for metric in metrics.values())
    teacher = reports["teacher (first)"]["metrics"]
    assert set(teacher) == {"ppl:words"}
    assert teacher["ppl:words"]["value"] == pytest.approx(F.nll_loss(teacher_nV, labels_n).exp().item(), rel=1e-4)


def test_a_teacher_beside_itself(models: dict[str, Path]) -> None:
    """Measured as any model is: no divergence, full agreement, on the text that ships."""
    metrics = run(models, "--max-tokens", "320", names=("teacher",))["teacher"]["metrics"]
    assert metrics["kl:excerpt"]["value"] == pytest.approx(0, abs=1e-9)
    assert metrics["agreement:excerpt"]["value"] == 1


def test_sizes_are_those_on_disk(models: dict[str, Path]) -> None:
    reports = run(models, "--max-tokens", "32", names=("student", "packed", "teacher"))
    sizes = packed_sizes(PackedFolder.open(models["packed"]))
    for name in ("student", "packed"):
        found = {key: reports[name][key] for key in ("bits_per_weight", "bytes", "bytes_without_embeddings")}
        assert found == {key: getattr(sizes, key) for key in found}
    teacher = tiny_model("llama")
    parameters, table = sum(p.numel() for p in teacher.parameters()), teacher.get_input_embeddings().weight.numel()
    assert reports["teacher"]["bits_per_weight"] == 16
    assert reports["teacher"]["bytes"] == 2 * parameters
    assert reports["teacher"]["bytes_without_embeddings"] == 2 * (parameters - table)
    untied = tiny_model("llama-untied")
    assert model_sizes(untied).bytes - model_sizes(untied).bytes_without_embeddings == 2 * 2 * table


def test_a_task_from_yaml(models: dict[str, Path], tmp_path: Path) -> None:
    """Rows that are labelled with what the teacher itself likes best: it is right in all of them."""
    teacher, tokenizer, labels = tiny_model("llama"), tiny_tokenizer(), (" brown", " teacher")
    rows = []
    for sentence in SENTENCES:
        scores = []
        for label in labels:
            prompt, words = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (sentence, label))
            with torch.no_grad():
                log_TV = teacher(torch.tensor([prompt + words])).logits[0].log_softmax(-1)
            scores.append(sum(log_TV[len(prompt) + i - 1, token].item() for i, token in enumerate(words)))
        rows.append({"words": sentence, "label": int(scores[1] > scores[0])})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = {"name": "liking", "path": str(tmp_path / "rows.jsonl"), "template": "{words}", "labels": list(labels)}
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    reports = run(models, "--max-tokens", "32", "--task", tmp_path / "task.yaml", names=("packed",))
    assert reports["teacher (first)"]["metrics"]["accuracy:liking"]["value"] == 1
    found = reports["packed"]["metrics"]
    assert 0 <= found["accuracy:liking"]["value"] <= 1
    assert found["accuracy_gap:liking"]["value"] == pytest.approx(found["accuracy:liking"]["value"] - 1)
    assert found["agreement:liking"]["value"] == found["accuracy:liking"]["value"]  # the teacher predicts every label


@pytest.mark.parametrize(
    ("argument", "path", "column"),
    [
        ("wiki=lm/test.parquet", "lm/test.parquet", "text"),
        ("wiki=lm/test.parquet:body", "lm/test.parquet", "body"),
        ("wiki=s3://bucket/test.parquet", "s3://bucket/test.parquet", "text"),
        ("wiki=s3://bucket/test.parquet:body", "s3://bucket/test.parquet", "body"),
    ],
)
def test_texts_on_the_command_line(argument: str, path: str, column: str) -> None:
    text = text_config(argument, " ")
    assert (text.name, text.path, text.text_column, text.join) == ("wiki", path, column, " ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--text", "nameless"), "--text: 'nameless'. Write NAME=PATH"),
        (("--task", "task.yaml"), "task.yaml.labels: Field required. Keys: name, path"),
    ],
)
def test_mistakes_are_named(
    arguments: tuple[str, str],
    said: str,
    models: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "task.yaml").write_text("{name: x, path: y, template: z}", encoding="utf-8")
    assert main([str(models["packed"]), "--teacher", str(models["teacher"]), *arguments]) == 2
    assert said in capsys.readouterr().err


def test_another_vocabulary_is_refused(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = save_tiny(tmp_path / "other", vocab_size=352)
    assert main([str(other), "--teacher", str(models["teacher"]), "--max-tokens", "32", "--device", "cpu"]) == 2
    assert "another vocabulary (352 logits) than the teacher (320)" in capsys.readouterr().err
