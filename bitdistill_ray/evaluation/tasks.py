"""Accuracy on a classification set: the label whose words the model finds likeliest after the prompt.

Each label's words are appended to the prompt and scored by their summed log-probability (teacher forcing), so labels of
several tokens work; the highest sum wins.  Nothing is generated and nothing is parsed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bitdistill_ray.core import TokenBatch
from bitdistill_ray.data.template import Template
from bitdistill_ray.evaluate_config import TaskConfig
from bitdistill_ray.evaluation.metric import ModelReport
from bitdistill_ray.model.forward import hidden_states
from bitdistill_ray.model.heads import LMHead

ROWS_AT_A_TIME = 16


def measure_task(
    model: nn.Module, tokenizer: Any, rows: Sequence[dict[str, Any]], task: TaskConfig, report: ModelReport
) -> None:
    """Add `accuracy:NAME`, the share of rows whose label is predicted, to a report.

    Raises:
        DataError: a column that the rows do not have, a label without words.
    """
    template, where = template_of(task), f"tasks.{task.name}"
    labels_W = np.array([template.label(row, where) for row in rows])
    predicted_W = np.array(predict(model, tokenizer, rows, task))
    words = f"{len(rows)} rows, labels {list(task.labels.values())} scored by log-probability"
    report.add_rows(f"accuracy:{task.name}", (predicted_W == labels_W).astype(float), words)
    report.predictions[task.name] = predicted_W


def template_of(task: TaskConfig) -> Template:
    """How its rows become prompts and labels."""
    return Template(task.template, task.label_column, tuple(task.labels.items()))


def predict(model: nn.Module, tokenizer: Any, rows: Sequence[dict[str, Any]], task: TaskConfig) -> list[int]:
    """The predicted label number of every row.

    Raises:
        DataError: the template names a column that the rows do not have.
    """
    labels = [tokenizer(words, add_special_tokens=False)["input_ids"] for words in task.labels.values()]
    predictions: list[int] = []
    for first in range(0, len(rows), ROWS_AT_A_TIME):
        prompts = [_prompt(tokenizer, row, task) for row in rows[first : first + ROWS_AT_A_TIME]]
        scores_RL = torch.stack([_scores(model, prompts, label) for label in labels], dim=1)
        predictions += scores_RL.argmax(dim=1).tolist()
    return predictions


def _prompt(tokenizer: Any, row: dict[str, Any], task: TaskConfig) -> list[int]:
    text = template_of(task).prompt(row, f"tasks.{task.name}")
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


@torch.no_grad()
def _scores(model: nn.Module, prompts: list[list[int]], label: list[int]) -> Tensor:
    """Summed log-probability of `label`'s tokens after each prompt, fp32 [R]."""
    width = max(map(len, prompts)) + len(label)
    ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    segment = torch.full((len(prompts), width), -1, dtype=torch.int32)
    for i, prompt in enumerate(prompts):
        ids[i, : len(prompt) + len(label)] = torch.tensor(prompt + label)
        segment[i, : len(prompt) + len(label)] = 0
    batch = TokenBatch(ids_BT=ids, target_BT=segment >= 0, segment_BT=segment, sequence_ids=("",) * len(prompts))
    hidden_BTD = hidden_states(model, batch.to(next(model.parameters()).device))
    # the states that predict the label's tokens: from the prompt's last token on
    at_RS = torch.tensor([[len(p) - 1 + j for j in range(len(label))] for p in prompts], device=hidden_BTD.device)
    picked_RSD = hidden_BTD.gather(1, at_RS.unsqueeze(-1).expand(-1, -1, hidden_BTD.shape[-1]))
    log_RSV: Tensor = LMHead(model)(picked_RSD).float().log_softmax(-1)
    label_RS = torch.tensor(label, device=log_RSV.device).expand_as(at_RS)
    return log_RSV.gather(-1, label_RS.unsqueeze(-1)).sum((1, 2)).cpu()
