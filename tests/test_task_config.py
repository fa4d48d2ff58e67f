"""Shipped tasks: one word in a recipe is all it takes to learn and to measure one."""

from __future__ import annotations

from typing import Any

import pytest

from bitdistill_ray import recipe
from bitdistill_ray.config import Config
from bitdistill_ray.errors import ConfigError
from bitdistill_ray.evaluate_config import EvaluateStage, TaskConfig, WritingConfig
from bitdistill_ray.shipped import shipped
from bitdistill_ray.stage_config import SourceConfig
from bitdistill_ray.task_config import TASKS

LABELLED = ("sst2", "qnli", "mnli")
COLUMNS = {  # of the hub's sets, and of files in their layout
    "sst2": {"sentence"},
    "qnli": {"question", "sentence"},
    "mnli": {"premise", "hypothesis"},
    "cnn-dailymail": {"article"},
}


def with_tasks(*overrides: str) -> Config:
    return recipe.load("bitdistill-ternary", ["data=/corpus", *overrides])


def evaluated(config: Config) -> EvaluateStage:
    stage = config.stages["evaluate"]
    assert isinstance(stage, EvaluateStage)
    return stage


@pytest.mark.parametrize("name", shipped(TASKS))
def test_a_tasks_name_is_enough_to_learn_and_to_measure_it(name: str) -> None:
    section = "tasks" if name in LABELLED else "writing"
    config = with_tasks(f"data.task={name}", f"stages.evaluate.{section}={name}")
    (source,) = config.data.task
    (measured,) = getattr(evaluated(config), section)
    assert source.path.startswith("hub:")
    assert measured.path[0].startswith("hub:")
    assert measured.path != (source.path,)
    assert source.template == measured.template
    assert {column for column in COLUMNS[name] if f"{{{column}}}" in measured.template} == COLUMNS[name]
    if isinstance(measured, TaskConfig):
        assert measured.labels == source.labels
        assert list(measured.labels) == [str(i) for i in range(3 if name == "mnli" else 2)]
        assert all(words.startswith(" ") for words in measured.labels.values())
    else:
        assert isinstance(measured, WritingConfig)
        assert measured.reference_column == source.response_column == "highlights"


def test_a_task_takes_paths_and_anything_else_of_ones_own() -> None:
    config = with_tasks("data.task={task: sst2, path: /sst2/train.parquet}",
                        'stages.evaluate.tasks=[{task: sst2, path: [/sst2/a, /sst2/b], name: mine}, qnli]')  # fmt: skip
    assert config.data.task[0].path == "/sst2/train.parquet"
    assert config.data.task[0].labels == {"0": " negative", "1": " positive"}
    mine, qnli = evaluated(config).tasks
    assert (mine.name, mine.path, mine.labels) == ("mine", ("/sst2/a", "/sst2/b"), config.data.task[0].labels)
    assert qnli.name == "qnli"
    own = with_tasks('data.task={path: /t.jsonl, template: "{q}?", labels: {easy: " E", hard: " H"}}').data.task[0]
    assert own.labels == {"easy": " E", "hard": " H"}
    assert recipe.load("bitdistill-ternary", ["data=/corpus", "data.task=/a/folder"]).data.task[0].path == "/a/folder"
    assert recipe.check(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.task={task: sst3}", r"task: there is none called 'sst3'. Did you mean 'sst2'?"),
        (
            "stages.evaluate.tasks=cnn-dailymail",
            "cnn-dailymail is answered by a text, not by a label. Put it",
        ),
        ("stages.evaluate.writing=qnli", "writing: qnli is answered by a label. Put it under `tasks`"),
        ('data.task={path: /t, labels: [" a"]}', "data: /t: labels without a template"),
        ('data.task={path: /t, template: "{q}"}', "data: /t: a template is answered either by labels or by"),
        ('data.task={path: /t, template: "{q}", labels: [" a"], response_column: r}', "a template is answered either"),
    ],
)
def test_what_is_no_task_is_refused(override: str, said: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        with_tasks(override)
    assert said in str(refusal.value)


def test_a_template_is_no_key_of_plain_text() -> None:
    values: dict[str, Any] = {"path": "/t", "template": "{q}", "prompt_column": "p", "response_column": "r"}
    with pytest.raises(ConfigError, match="no prompt_column"):
        SourceConfig(**values)
