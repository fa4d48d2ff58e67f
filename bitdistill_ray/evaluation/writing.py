"""What a model writes after a prompt, greedily, beside a reference: ROUGE-1, -2, -L, -Lsum and BLEU.

ROUGE is the mean F1 over rows of the package rouge-score (stems, lower case), BLEU the corpus BLEU of sacrebleu, both
in percent; intervals are the central 95 % of a bootstrap over rows.  A prompt that does not fit loses the end of its
longest column, never the words of the template around it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from bitdistill_ray.data.template import Template
from bitdistill_ray.decode.generation import generate
from bitdistill_ray.decode.loading import decoder_over, stop_ids
from bitdistill_ray.decode.sampling import Sampling
from bitdistill_ray.errors import DataError
from bitdistill_ray.evaluate_config import WritingConfig
from bitdistill_ray.evaluation.metric import RESAMPLES, Metric, ModelReport

ROUGES = ("rouge1", "rouge2", "rougeL", "rougeLsum")  # the last takes each line for a sentence
HALF_A_CHARACTER = "\N{REPLACEMENT CHARACTER}"  # of which a cut between tokens left some bytes
Row = dict[str, Any]


def measure_writing(
    model: nn.Module, tokenizer: Any, rows: Sequence[Row], task: WritingConfig, report: ModelReport
) -> None:
    """Add `rouge1:NAME`, `rouge2:NAME`, `rougeL:NAME`, `rougeLsum:NAME` and `bleu:NAME` to a report.

    Raises:
        DataError: no rows, or a column that they do not have.
    """
    if not rows:
        raise DataError(f"writing.{task.name}", "holds no rows", "Check its path")
    if task.reference_column not in rows[0]:
        raise DataError(f"writing.{task.name}.reference_column", f"{task.reference_column!r} is no column",
                        f"Columns: {sorted(rows[0])}")  # fmt: skip
    written = write(model, tokenizer, rows, task)
    references = [str(row[task.reference_column]) for row in rows]
    protocol = f"{len(written)} rows, greedy; rouge-score, stems, F1"
    for name, values in rouge(written, references).items():
        report.add_rows(f"{name}:{task.name}", values, protocol)
    report.metrics[f"bleu:{task.name}"] = bleu(written, references)


def write(model: Any, tokenizer: Any, rows: Sequence[Row], task: WritingConfig) -> list[str]:
    """The greedy continuation of every row's prompt."""
    prompts = [prompt_ids(tokenizer, row, task) for row in rows]
    longest = max(map(len, prompts)) + task.max_new_tokens
    decoder = decoder_over(model, slots=min(task.batch, len(prompts)), slot_tokens=longest)
    sampling = Sampling(max_tokens=task.max_new_tokens, temperature=0)
    texts = generate(decoder, prompts, sampling, stop_ids=stop_ids(model, tokenizer))
    decoded: list[str] = tokenizer.batch_decode([list(text.ids) for text in texts], skip_special_tokens=True)
    return [text.strip() for text in decoded]


def prompt_ids(tokenizer: Any, row: Row, task: WritingConfig) -> list[int]:
    """The template filled with the row, at most `max_prompt_tokens` tokens.

    Raises:
        DataError: the template names a column that is not there, or is too long by itself.
    """
    columns, where = {name: str(value) for name, value in row.items()}, f"writing.{task.name}.template"
    template = Template(task.template, task.reference_column)
    longest = max((name for name in template.fields if name in columns), key=lambda n: len(columns[n]), default="")
    while True:
        text = template.prompt(columns, where)
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        over = len(ids) - task.max_prompt_tokens
        if over <= 0:
            return ids
        text = columns.get(longest, "")
        if not text:
            raise DataError(where, f"{len(ids)} tokens without its longest column", "Raise max_prompt_tokens")
        own = tokenizer(text, add_special_tokens=False)["input_ids"]
        kept = tokenizer.decode(own[: max(0, len(own) - over)]).rstrip(HALF_A_CHARACTER)
        columns[longest] = kept if len(kept) < len(text) else text[:-1]


def rouge(written: Sequence[str], references: Sequence[str]) -> dict[str, np.ndarray]:
    """Each text's F1, in percent, by our names."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(ROUGES, use_stemmer=True)
    found = [scorer.score(reference, text) for text, reference in zip(written, references, strict=True)]
    return {name: np.array([100 * f[name].fmeasure for f in found]) for name in ROUGES}


def bleu(written: Sequence[str], references: Sequence[str]) -> Metric:
    """Of the whole corpus, in percent."""
    from sacrebleu.metrics.bleu import BLEU

    whole = BLEU().corpus_score(list(written), [list(references)], n_bootstrap=RESAMPLES)
    low, high = whole._mean - whole._ci, whole._mean + whole._ci
    return Metric(float(whole.score), float(low), float(high), f"{len(written)} rows, greedy; sacrebleu, corpus")
