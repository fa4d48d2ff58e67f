"""`evaluate`: teacher, baselines and student side by side, on texts and tasks.

What is measured is the *packed* student: its codes, dequantised, on the hardware at hand.  KL and agreement are against
the teacher that the student learned from.
"""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

import torch
from ray.experimental import tqdm_ray

from bitdistill_ray.data.tables import read_rows, read_texts
from bitdistill_ray.evaluation import language, tasks
from bitdistill_ray.evaluation.metric import ModelReport
from bitdistill_ray.evaluation.table import print_table
from bitdistill_ray.hardware import compute_dtype, local_device
from bitdistill_ray.model.load import load_model
from bitdistill_ray.packed.folder import PackedFolder
from bitdistill_ray.packed.model import load_packed_model
from bitdistill_ray.packed.summary import summarise
from bitdistill_ray.runs import StageRecord, storage_opener
from bitdistill_ray.stage_config import EvaluateStage, SourceConfig, TaskConfig
from bitdistill_ray.stages.base import StageContext, stage
from bitdistill_ray.stages.cluster import on_cluster
from bitdistill_ray.stages.corpus import source_of

NAMES = {"packed-rtn": "round-to-nearest", "packed-clipped": "clipped only", "packed": "trained"}


@stage("evaluate")
def evaluate(context: StageContext) -> StageRecord:
    """Write `evaluation.json` and print the table."""
    reports: list[ModelReport] = on_cluster(_evaluate, context, resources=context.config.student)
    content = {"models": [report.to_dict() for report in reports]}
    context.run.storage.write_bytes("evaluation.json", json.dumps(content, indent=1).encode())
    print_table(reports)
    return context.record({}, evaluation=content["models"])


def _evaluate(context: StageContext) -> list[ModelReport]:
    options, config = context.stage, context.config
    assert isinstance(options, EvaluateStage)
    device = local_device()
    dtype, _ = compute_dtype(config.student.dtype, device)
    opener = storage_opener(config.storage)
    teacher, tokenizer = load_model(context.teacher_source, dtype=dtype, device=device, storage=opener)
    texts = {
        name: language.windows(text, tokenizer, context=options.context, max_tokens=options.max_tokens)
        for name, text in gather_texts(context, options).items()
    }
    rows = {task.name: (task, read_rows(source_of(context, SourceConfig(path=task.path)))[: task.limit])
            for task in options.tasks}  # fmt: skip
    reports = [_teacher_report(teacher)]
    _measure(reports[0], teacher, teacher, tokenizer, texts, rows)
    roles = [role for role in NAMES if role == "packed" or options.baselines]
    for role in tqdm_ray.tqdm(roles, desc=f"{context.name}: models"):
        path = context.earlier(role)
        if path is None:
            continue
        folder = context.run.fetch(path)
        student, _ = load_packed_model(folder, dtype=dtype, device=device, kernels=False)
        sizes = summarise(PackedFolder.open(folder))
        report = ModelReport(NAMES[role], sizes.bits_per_weight, sizes.bytes, sizes.bytes_without_embeddings)
        _measure(report, student, teacher, tokenizer, texts, rows)
        reports.append(report)
    return reports


def gather_texts(context: StageContext, options: EvaluateStage) -> dict[str, str]:
    """The texts to measure on, by name."""
    texts = {}
    if options.written and context.earlier("held-out"):
        held_out = context.run.storage.url_of(str(context.earlier("held-out")))
        texts["written"] = "\n\n".join(read_texts(source_of(context, SourceConfig(path=held_out))))
    if options.excerpt:
        excerpt = resources.files("bitdistill_ray") / "recipes" / "excerpt.txt"
        texts["excerpt"] = excerpt.read_text(encoding="utf-8")
    for text in options.texts:
        rows = read_texts(source_of(context, SourceConfig(path=text.path, text_column=text.text_column)))
        texts[text.name] = text.join.join(rows)
    return texts


def _measure(
    report: ModelReport,
    model: Any,
    teacher: Any,
    tokenizer: Any,
    texts: dict[str, torch.Tensor],
    rows: dict[str, tuple[TaskConfig, list[dict[str, Any]]]],
) -> None:
    for name, ids_WT in texts.items():
        report.metrics |= language.measure(model, teacher, ids_WT, name=name, alone=model is teacher)
    for name, (task, examples) in rows.items():
        report.metrics[f"accuracy:{name}"] = tasks.accuracy(model, tokenizer, examples, task)


def _teacher_report(teacher: Any) -> ModelReport:
    """The teacher's sizes in 16 bits, whatever it is held in here."""
    total = sum(p.numel() for p in teacher.parameters())
    embeddings = {
        id(m.weight): m.weight.numel() for m in (teacher.get_input_embeddings(), teacher.get_output_embeddings())
    }
    return ModelReport("teacher", 16.0, 2 * total, 2 * (total - sum(embeddings.values())))
