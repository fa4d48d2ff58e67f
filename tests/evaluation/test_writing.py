"""Texts written beside a reference: prompts that fit, greedy text, scores as their packages give them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from bitdistill_ray.errors import DataError
from bitdistill_ray.evaluate import main
from bitdistill_ray.evaluate_config import WritingConfig
from bitdistill_ray.evaluation.metric import ModelReport
from bitdistill_ray.evaluation.writing import bleu, measure_writing, prompt_ids, rouge, write
from tests.tiny_models import SENTENCES, save_tiny, tiny_model, tiny_tokenizer

ROWS = [
    {"article": sentence, "summary": " ".join(sentence.split()[:3]), "id": n} for n, sentence in enumerate(SENTENCES)
]
TASK = WritingConfig(name="cnn", path="-", template="{article}\nIn short:", reference_column="summary",
                     max_prompt_tokens=64, max_new_tokens=9, batch=3)  # fmt: skip


def test_the_text_is_what_transformers_writes_greedily() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    wanted = []
    for row in ROWS:
        ids = torch.tensor([tokenizer(TASK.template.format(**row), add_special_tokens=False)["input_ids"]])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=9)
        wanted.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip())
    assert write(model, tokenizer, ROWS, TASK) == wanted
    assert len(set(wanted)) > 1


@pytest.mark.parametrize("article", [" ".join(SENTENCES), "\N{OLD KEY}\N{CLOUD} " * 40], ids=["words", "bytes"])
@pytest.mark.parametrize("most", [*range(12, 18), 30])
def test_a_long_prompt_loses_the_end_of_its_longest_column(most: int, article: str) -> None:
    tokenizer = tiny_tokenizer()
    task = TASK.model_copy(update={"max_prompt_tokens": most, "template": "{id}: {article}\nIn short:"})
    row = {"article": article, "id": 3, "art": article * 2}  # the last is in no template
    text = tokenizer.decode(prompt_ids(tokenizer, row, task))
    assert len(prompt_ids(tokenizer, row, task)) <= most
    assert text.startswith("3:")
    assert text.endswith("In short:")
    with pytest.raises(DataError, match=r"tokens without its longest column\. Raise max_prompt_tokens"):
        prompt_ids(tokenizer, row, task.model_copy(update={"max_prompt_tokens": 2}))
    with pytest.raises(DataError, match=r"writing\.cnn\.template: no column 'story', which the template names"):
        prompt_ids(tokenizer, row, task.model_copy(update={"template": "{story}"}))


def test_scores_are_percentages_with_intervals_around_them() -> None:
    references = ["the cats sat on the mat", "it rained for two days in the north", "a bird sang"] * 4
    assert {name: values.mean() for name, values in rouge(references, references).items()} == pytest.approx(
        {"rouge1": 100, "rouge2": 100, "rougeL": 100, "rougeLsum": 100})  # fmt: skip
    assert bleu(references, references).value == pytest.approx(100)
    texts = ["the cat sat", "a bird\nthe sea"] * 6, ["the cat sat on the mat", "the sea\na bird"] * 6
    assert {name: values.mean() for name, values in rouge(*texts).items()} == pytest.approx({
        "rouge1": 100 * (2 / 3 + 1) / 2,  # precision 1, recall 3 / 6; the same words
        "rouge2": 100 * (4 / 7 + 2 / 3) / 2,  # 2 of 2 and 2 of 5 pairs; 2 of 3 and 2 of 3, lines or not
        "rougeL": 100 * (2 / 3 + 1 / 2) / 2,  # 2 of 4 words in order
        "rougeLsum": 100 * (2 / 3 + 1) / 2,  # lines are sentences, in whatever order
    })  # fmt: skip
    found = bleu(*texts)
    assert 0 < found.low < found.value < found.high < 100


def test_it_is_measured_by_the_command_beside_the_teacher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    task = {**TASK.model_dump(), "path": str(tmp_path / "rows.jsonl"), "limit": 2}
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    model = str(save_tiny(tmp_path / "model"))
    arguments = [model, "--teacher", model, "--dtype", "fp32", "--device", "cpu", "--max-tokens", "64",
                 "--task", str(tmp_path / "task.yaml"), "--json", str(tmp_path / "out.json")]  # fmt: skip
    assert main(arguments) == 0
    models = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["models"]
    names = {"rouge1:cnn", "rouge2:cnn", "rougeL:cnn", "bleu:cnn"}
    assert all(names < set(found["metrics"]) for found in models)
    assert models[0]["metrics"]["rouge1:cnn"] == models[1]["metrics"]["rouge1:cnn"]
    gap = models[1]["metrics"]["rougeL_gap:cnn"]
    assert (gap["value"], gap["low"], gap["high"]) == (0, 0, 0)
    assert models[0]["metrics"]["rouge1:cnn"]["protocol"].startswith("2 rows, greedy")
    (tmp_path / "task.yaml").write_text(yaml.safe_dump({**task, "reference_column": "highlights"}), encoding="utf-8")
    capsys.readouterr()
    assert main(arguments) == 2
    assert "writing.cnn.reference_column: 'highlights' is no column. Columns: " in capsys.readouterr().err


def test_a_set_without_rows_is_refused() -> None:
    with pytest.raises(DataError, match=r"writing\.cnn: holds no rows"):
        measure_writing(tiny_model("llama"), tiny_tokenizer(), [], TASK, ModelReport("m", 16.0, 1, 1))
