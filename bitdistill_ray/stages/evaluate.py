"""`evaluate`: teacher, baselines and student side by side, on texts and tasks.

What is measured is the *packed* student: its codes, dequantised, on the hardware at hand.  KL and agreement are against
the teacher that the student learned from.
"""

from __future__ import annotations

import json
from typing import Any

from bitdistill_ray.data.tables import read_rows, read_texts
from bitdistill_ray.evaluate_config import EvaluateStage, TaskConfig, WritingConfig
from bitdistill_ray.evaluation.candidate import load_candidate
from bitdistill_ray.evaluation.metric import ModelReport
from bitdistill_ray.evaluation.suite import TEACHER, Suite, as_json, excerpt, rows_json
from bitdistill_ray.evaluation.table import print_table
from bitdistill_ray.hardware import compute_dtype, local_device
from bitdistill_ray.runs import ROWS, StageRecord, storage_opener
from bitdistill_ray.stage_config import SourceConfig
from bitdistill_ray.stages.base import StageContext, stage
from bitdistill_ray.stages.cluster import on_cluster
from bitdistill_ray.stages.corpus import source_of, texts_of
from bitdistill_ray.stages.notes import Notes

NAMES = {"packed-rtn": "round-to-nearest", "packed-clipped": "clipped only", "packed-gptq": "GPTQ only",
         "packed-reconstructed": "reconstructed only", "packed": "trained"}  # fmt: skip


@stage("evaluate")
def evaluate(context: StageContext) -> StageRecord:
    """Write `evaluation.json` and print the table."""
    reports: list[ModelReport] = on_cluster(_evaluate, context)
    content = as_json(reports)
    context.run.storage.write_bytes("evaluation.json", json.dumps(content, indent=1).encode())
    if rows := rows_json(reports):
        context.run.storage.write_bytes(ROWS, json.dumps(rows).encode())
    print_table(reports)
    return context.record({}, evaluation=content["models"])


def _evaluate(context: StageContext, notes: Notes) -> list[ModelReport]:
    options, config = context.stage, context.config
    assert isinstance(options, EvaluateStage)
    device = local_device()
    dtype, _ = compute_dtype(config.student.dtype, device)
    opener = storage_opener(config.storage)
    teacher = load_candidate(context.teacher_source, dtype=dtype, device=device, storage=opener)

    def rows_of(task: TaskConfig | WritingConfig) -> list[dict[str, Any]]:
        rows = [row for path in task.path for row in read_rows(source_of(context, SourceConfig(path=path)))]
        return rows[: task.limit]

    suite = Suite.of(
        gather_texts(context, options),
        [(task, rows_of(task)) for task in options.tasks],
        teacher.tokenizer,
        context=options.context,
        max_tokens=options.max_tokens,
        harness=options.harness,
        writing=[(task, rows_of(task)) for task in options.writing],
    )
    reports = [suite.report(TEACHER, teacher, teacher)]
    roles = [role for role in NAMES if role == "packed" or options.baselines]
    for role in notes.each(roles, total=len(roles)):
        path = context.earlier(role)
        if path is not None:
            student = load_candidate(str(context.run.fetch(path)), dtype=dtype, device=device)
            reports.append(suite.report(NAMES[role], student, teacher, beside=reports[0]))
    return reports


def gather_texts(context: StageContext, options: EvaluateStage) -> dict[str, str]:
    """The texts to measure on, by name."""
    texts = {}
    if options.written and context.earlier("held-out"):
        held_out = context.run.storage.url_of(str(context.earlier("held-out")))
        texts["written"] = "\n\n".join(read_texts(source_of(context, SourceConfig(path=held_out))))
    if options.excerpt:
        texts["excerpt"] = excerpt()
    return texts | texts_of(context, options.texts)
