"""The `evaluate` stage's section of the configuration: texts, tasks, the harness, texts to write."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from bitdistill_ray.errors import ConfigError
from bitdistill_ray.section import Strict
from bitdistill_ray.task_config import Labels, with_task


class TextConfig(Strict):
    """A text to measure perplexity, KL and agreement on."""

    name: str
    path: str
    text_column: str = "text"
    join: str = "\n\n"
    """What stands between two rows."""


Paths = Annotated[tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)]
"""One place, or several whose rows are measured as one set."""


class TaskConfig(Strict):
    """A classification set, scored by the log-probability of each label's words after the prompt.

    `NAME` and `{task: NAME, path: …}` take a task that ships."""

    name: str
    path: Paths
    template: str
    """Prompt with `{column}` fields."""
    labels: Labels
    """The words of label 0, 1, …, or of each value of the label column."""
    label_column: str = "label"
    limit: int | None = Field(None, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _shipped(cls, value: Any) -> Any:
        section = with_task(value, split="test")
        if isinstance(section, dict) and "response_column" in section:
            raise ConfigError("tasks", f"{section.get('name')} is answered by a text, not by a label",
                              "Put it under `writing`")  # fmt: skip
        return section


class HarnessConfig(Strict):
    """Tasks of EleutherAI's lm-evaluation-harness; it needs `pip install bitdistill-ray[tasks]`."""

    tasks: tuple[str, ...] = Field(min_length=1)
    """Names of the harness, such as arc_easy, piqa, lambada_openai, gsm8k."""
    include: str | None = None
    """Local folder of task definitions beside the harness's own."""
    fewshot: int | None = Field(None, ge=0)
    """Solved examples in front of each question; empty: as the task says."""
    limit: int | None = Field(None, ge=1)
    """Rows of each task, at most."""
    batch: int = Field(16, ge=1)
    chat_template: bool = False

    @model_validator(mode="after")
    def _installed(self) -> HarnessConfig:
        _need("harness", "lm_eval")
        return self


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, dict | str) else value


class WritingConfig(Strict):
    """Texts that a model writes greedily after a prompt, scored by ROUGE and BLEU beside a reference; it needs
    `pip install bitdistill-ray[tasks]`.  `NAME` and `{task: NAME, path: …}` take a task that ships."""

    name: str
    path: Paths
    template: str
    """Prompt with `{column}` fields."""
    reference_column: str
    max_prompt_tokens: int = Field(1536, ge=1)
    """A longer prompt loses the end of its longest column."""
    max_new_tokens: int = Field(128, ge=1)
    batch: int = Field(16, ge=1)
    limit: int | None = Field(None, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _shipped(cls, value: Any) -> Any:
        section = with_task(value, split="test")
        if isinstance(section, dict) and "response_column" in section:
            section["reference_column"] = section.pop("response_column")
        if isinstance(section, dict) and "labels" in section:
            raise ConfigError("writing", f"{section.get('name')} is answered by a label", "Put it under `tasks`")
        return section

    @model_validator(mode="after")
    def _installed(self) -> WritingConfig:
        _need("writing", "rouge_score", "sacrebleu")
        return self


def _need(what: str, *modules: str) -> None:
    for module in modules:
        if find_spec(module) is None:
            raise ConfigError(f"stages.evaluate.{what}", f"the package {module.replace('_', '-')} is not installed",
                              f"Run `pip install bitdistill-ray[tasks]`, or leave {what} out")  # fmt: skip


class EvaluateStage(Strict):
    """Teacher, baselines and student side by side."""

    kind: Literal["evaluate"] = "evaluate"
    excerpt: bool = True
    """The public-domain excerpt that ships."""
    written: bool = True
    """The held-out part of what the teacher wrote, where there is one."""
    texts: tuple[TextConfig, ...] = ()
    tasks: Annotated[tuple[TaskConfig, ...], BeforeValidator(_listed)] = ()
    """Classification sets; one alone needs no list."""
    writing: Annotated[tuple[WritingConfig, ...], BeforeValidator(_listed)] = ()
    """Sections of texts to write; one alone needs no list."""
    harness: Annotated[tuple[HarnessConfig, ...], BeforeValidator(_listed)] = ()
    """Sections of harness tasks; one alone needs no list."""
    context: int = Field(512, ge=8)
    """Tokens of one evaluation window."""
    max_tokens: int | None = Field(None, ge=8)
    """Of each text, at most so many."""
    baselines: bool = False
    """Also measure round-to-nearest, and the clipped-only student where there is one."""
