"""What is measured on every model: some texts and some tasks, beside one teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any

from torch import Tensor, nn

from bitdistill_ray.errors import ModelError
from bitdistill_ray.evaluate_config import HarnessConfig, TaskConfig, WritingConfig
from bitdistill_ray.evaluation import language, tasks
from bitdistill_ray.evaluation.candidate import Candidate
from bitdistill_ray.evaluation.harness import measure_harness
from bitdistill_ray.evaluation.metric import ModelReport
from bitdistill_ray.evaluation.writing import measure_writing
from bitdistill_ray.machine import commit
from bitdistill_ray.packed.model import vocabulary_hash

TEACHER = "teacher"


@dataclass(frozen=True, slots=True)
class Suite:
    """The texts by name, as token windows [W, T], the tasks and the texts to write with their rows, and those tasks of
    the harness."""

    texts: Mapping[str, Tensor]
    tasks: Mapping[str, tuple[TaskConfig, Sequence[dict[str, Any]]]]
    harness: Sequence[HarnessConfig] = ()
    writing: Sequence[tuple[WritingConfig, Sequence[dict[str, Any]]]] = ()

    @classmethod
    def of(
        cls,
        texts: Mapping[str, str],
        task_rows: Sequence[tuple[TaskConfig, Sequence[dict[str, Any]]]],
        tokenizer: Any,
        *,
        context: int,
        max_tokens: int | None,
        harness: Sequence[HarnessConfig] = (),
        writing: Sequence[tuple[WritingConfig, Sequence[dict[str, Any]]]] = (),
    ) -> Suite:
        """Cut the texts into windows of `context` tokens, at most `max_tokens` of each."""
        cut = {n: language.windows(t, tokenizer, context=context, max_tokens=max_tokens) for n, t in texts.items()}
        return cls(cut, {task.name: (task, rows) for task, rows in task_rows}, harness, writing)

    def report(
        self, name: str, candidate: Candidate, teacher: Candidate, *, beside: ModelReport | None = None
    ) -> ModelReport:
        """Measure one model; what can be compared row by row also less the model of `beside`.

        Raises:
            ModelError: its vocabulary is not the teacher's.
        """
        if candidate is not teacher:
            check_vocabulary(name, candidate, teacher)
        report = ModelReport(name, **asdict(candidate.sizes))
        model: nn.Module = candidate.model
        for text, ids_WT in self.texts.items():
            alone = candidate is teacher
            report.metrics |= language.measure(model, teacher.model, ids_WT, name=text, alone=alone)
        for task, rows in self.tasks.values():
            tasks.measure_task(model, candidate.tokenizer, rows, task, report)
        for wanted, rows in self.writing:
            measure_writing(model, candidate.tokenizer, rows, wanted, report)
        for options in self.harness:
            report.metrics |= measure_harness(model, candidate.tokenizer, options)
        if beside is not None:
            report.add_gaps(beside)
        return report


def check_vocabulary(name: str, candidate: Candidate, teacher: Candidate) -> None:
    """Refuse a model that speaks of other tokens than the teacher: its KL would compare different words."""
    hashes = [vocabulary_hash(c.tokenizer) for c in (candidate, teacher)]
    widths = [int(c.model.config.vocab_size) for c in (candidate, teacher)]
    if hashes[0] != hashes[1] or widths[0] != widths[1]:
        raise ModelError(name, f"has another vocabulary ({widths[0]} logits) than the teacher ({widths[1]})",
                         "Give the teacher that it learned from")  # fmt: skip


def excerpt() -> str:
    """The public-domain text that ships."""
    return (resources.files("bitdistill_ray") / "recipes" / "excerpt.txt").read_text(encoding="utf-8")


def rows_json(reports: Sequence[ModelReport]) -> dict[str, dict[str, list[float]]]:
    """The rows' values by metric and model, of what is a mean over rows."""
    names = dict.fromkeys(name for report in reports for name in report.rows)
    return {name: {r.name: [round(float(v), 4) for v in r.rows[name]] for r in reports if name in r.rows}
            for name in names}  # fmt: skip


def as_json(reports: Sequence[ModelReport]) -> dict[str, Any]:
    """What `bitdistill evaluate --json` and the `evaluate` stage write."""
    return {"commit": commit(), "models": [report.to_dict() for report in reports]}
