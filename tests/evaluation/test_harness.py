"""Tasks of lm-evaluation-harness: its accuracy is that of our own label scoring, on packed students too."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from bitdistill_ray.core import Format, QuantSpec
from bitdistill_ray.evaluate import main
from bitdistill_ray.evaluate_config import TaskConfig
from bitdistill_ray.evaluation.harness import metrics_of
from bitdistill_ray.evaluation.metric import ModelReport
from bitdistill_ray.evaluation.tasks import measure_task
from bitdistill_ray.model.load import load_model
from bitdistill_ray.model.student import save_student
from bitdistill_ray.model.surgery import quantize_linears
from bitdistill_ray.packed.export import pack_student
from bitdistill_ray.packed.model import load_packed_model
from tests.tiny_models import SENTENCES, save_tiny, tiny_model, tiny_tokenizer

WORDS = ("the sea", "a bird", "rain", "of the old house")
PROMPTS = [" ".join(sentence.split()[:length]) for sentence in SENTENCES for length in range(2, 9)]
ROWS = [{"prompt": prompt, "label": number * number % 4} for number, prompt in enumerate(PROMPTS)]


@pytest.fixture
def definitions(tmp_path: Path) -> Path:
    """A folder with one task, whose rows lie in a local file."""
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    folder = tmp_path / "definitions"
    folder.mkdir()
    task = {
        "task": "sea_or_bird",
        "dataset_path": "parquet",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.parquet")}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": list(WORDS),
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}],
    }
    (folder / "sea_or_bird.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    return folder


@pytest.mark.slow  # the harness imports for half a minute
def test_the_harness_and_our_label_scoring_agree(
    definitions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    student = tiny_model("llama")
    quantize_linears(student, QuantSpec(format=Format.INT2, group_size=16))
    save_student(tmp_path / "student", student, tiny_tokenizer())
    pack_student(tmp_path / "student", tmp_path / "packed", {})
    teacher = str(save_tiny(tmp_path / "teacher"))
    arguments = [str(tmp_path / "packed"), "--teacher", teacher, "--dtype", "fp32", "--device", "cpu",
                 "--json", str(tmp_path / "out.json"), "--include", str(definitions)]  # fmt: skip
    assert main([*arguments, "--harness", "sea_or_bird:0"]) == 0
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["models"]

    task = TaskConfig(name="own", path="-", template="{prompt}", labels=tuple(f" {words}" for words in WORDS))
    packed, tokenizer = load_packed_model(tmp_path / "packed", kernels=False)
    plain, _ = load_model(teacher, dtype=torch.float32)
    own = []
    for model in (plain, packed):
        measure_task(model, tokenizer, ROWS, task, report := ModelReport("m", 16.0, 1, 1))
        own.append(report.metrics["accuracy:own"].value)
    metrics = [model["metrics"]["acc:sea_or_bird"] for model in found]
    assert [metric["value"] for metric in metrics] == pytest.approx(own)
    assert 0 < own[0] < 1
    assert all(metric["low"] < metric["value"] < metric["high"] for metric in metrics)
    assert metrics[0]["protocol"].endswith(f", 0-shot, {len(ROWS)} rows")

    capsys.readouterr()
    assert main([*arguments, "--harness", "nim"]) == 2
    assert "harness.tasks: nim: the harness knows no such task. See" in capsys.readouterr().err
    assert main([*arguments, "--harness", "sea_or_bird:few"]) == 2
    assert "--harness: 'sea_or_bird:few'. Write TASK" in capsys.readouterr().err


def test_a_filter_is_part_of_the_name_and_what_has_no_error_has_no_interval() -> None:
    results = {"alias": "gsm8k", "exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": 0.1,
               "perplexity,none": 9.0, "perplexity_stderr,none": "N/A", "sample_len": 7}  # fmt: skip
    found = {"n-shot": {"gsm8k": 5}, "n-samples": {"gsm8k": {"original": 9, "effective": 8}}}
    metrics = metrics_of("gsm8k", results, found, version="1")
    assert list(metrics) == ["exact_match:gsm8k,strict-match", "perplexity:gsm8k"]
    assert metrics["perplexity:gsm8k"].low == 9.0
    assert metrics["exact_match:gsm8k,strict-match"].high == pytest.approx(0.446)
    assert metrics["perplexity:gsm8k"].protocol == "lm-eval 1, 5-shot, 8 rows"
