"""The recipes for the papers' own scale, run from end to end on random models of two layers and two workers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bitdistill_ray import recipe, sweep
from bitdistill_ray.config import Config
from bitdistill_ray.stage_config import TrainStage
from bitdistill_ray.train import run
from tests.tiny_models import save_tiny

pytestmark = [pytest.mark.soak, pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(900)]

SCALE = {
    "bitdistiller-int2-llama2-7b": "llama-untied",
    "bitdistiller-nf3-llama2-7b": "llama-untied",
    "bitdistiller-int2-qwen3-8b": "qwen3-untied",
    "bitdistill-ternary-qwen3-0.6b": "qwen3",
    "bitdistill-ternary-qwen3-1.7b": "qwen3",
    "bitdistill-ternary-qwen3-4b": "qwen3",
}
SMALL = {
    "quant.group_size": 16,
    "data.sequence_length": 32,
    "data.shuffle_window": 16,
    "teacher.actors": 1,
    "teacher.gpus": 0,
    "student.workers": 2,
    "student.gpus": 0,
    "student.micro_batch": 2,
    "student.chunk_tokens": 16,
    "stages.write.texts": 16,
    "stages.write.max_new_tokens": 40,
    "stages.write.batch": 8,
    "stages.write.max_repetition": 1,
    "stages.clip.calibration_sequences": 4,
    "stages.refine.calibration_sequences": 4,
    "stages.distill.loss.relation.heads": 8,
    "stages.distill.loss.relation.layer": 1,
    "stages.evaluate.context": 32,
    "stages.evaluate.max_tokens": 256,
    "monitor.tensorboard": False,
}


def small(name: str, root: Path) -> Config:
    """The recipe with everything that makes it large made small, and nothing else changed."""
    texts = [
        f"data={root}/corpus.jsonl",
        f"data.task={{path: {root}/task.jsonl, prompt_column: p, response_column: r}}",
    ]
    written = recipe.load(name, texts)
    trains = {
        f"stages.{stage}.{key}": value
        for stage, section in written.stages.items()
        if isinstance(section, TrainStage)
        for key, value in {"tokens": 768, "batch_sequences": 4, "checkpoint_every": 3}.items()
    }
    tree = json.loads(written.model_dump_json())

    def known(path: str) -> bool:
        """Whether the recipe sets this, so that no stage or loss comes in by being made small."""
        node = tree
        for key in path.split("."):
            if not isinstance(node, dict) or node.get(key) is None:
                return False
            node = node[key]
        return True

    overrides = [f"{path}={value}" for path, value in {**SMALL, **trains}.items() if known(path)]
    teacher = save_tiny(root / "teacher", SCALE[name])
    return recipe.load(name, [*texts, *overrides, f"model.teacher={teacher}", f"run={root}/run"])


@pytest.mark.parametrize("name", SCALE)
def test_a_large_recipe_goes_through_at_small_size(name: str, tmp_path: Path) -> None:
    sentences = [f"the cat number {n} sat on the mat and looked at the sea" for n in range(120)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in sentences))
    (tmp_path / "task.jsonl").write_text("\n".join(json.dumps({"p": f"cat {n}", "r": " yes"}) for n in range(120)))
    config = small(name, tmp_path)
    assert config.student.workers == 2
    summary = run(config)
    assert list(summary["stages"]) == list(config.stages)
    trained = next(m for m in summary["stages"]["evaluate"]["evaluation"] if m["name"] == "trained")
    assert 0 < trained["metrics"]["kl:excerpt"]["value"] < 10


def test_the_table_of_a_task_makes_its_rows_at_small_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From continued training to three seeds of students and the 16-bit models that they are compared with."""
    (tmp_path / "corpus.txt").write_text("the cat sat on the mat and looked at the rain\n" * 80)
    rows = [{"sentence": f"the cat number {n} sat", "label": n % 2} for n in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train = {"tokens": 256, "batch_sequences": 4, "checkpoint_every": 100}
    overrides = [f"stages.{stage}.{key}={value}" for stage in ("pretrain", "finetune", "distill")
                 for key, value in train.items()]  # fmt: skip
    small_ones = [f"{key}={value}" for key, value in SMALL.items()
                  if key.startswith(("data.", "student.", "stages.refine.", "stages.evaluate.", "monitor."))
                  and key != "student.workers"]  # fmt: skip
    task = f"task: sst2, path: {tmp_path}/rows.jsonl"
    arguments = ["ternary-sst2", "--rows", "distilled", "--run", f"{tmp_path}/table", f"data={tmp_path}/corpus.txt",
                 f"data.task={{{task}}}", f"stages.evaluate.tasks={{{task}}}", "teacher.gpus=0",
                 f"model.teacher={save_tiny(tmp_path / 'teacher', 'llama')}", *small_ones, *overrides,
                 "stages.distill.loss.relation={weight: adaptive, heads: 8, layer: 1}"]  # fmt: skip
    assert sweep.main(arguments) == 0
    _, means = capsys.readouterr().out.split("| runs |")
    lines = [line.strip("| ").split(" | ") for line in means.splitlines() if "accuracy" in line]
    assert [cells[:2] for cells in lines] == [["stage2", "1"], ["fp16", "3"], ["distilled", "3"]]
