"""Tasks of EleutherAI's lm-evaluation-harness on any candidate: its prompts, its scoring, its standard errors.

The harness reads its data sets from the Hugging Face hub; `include` names a folder of task definitions of one's own
(the harness's YAML), which may read local files.  A metric's interval is the value and 1.96 standard errors each way.
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from bitdistill_ray.errors import DataError
from bitdistill_ray.evaluate_config import HarnessConfig
from bitdistill_ray.evaluation.metric import Metric

NORMAL_95 = 1.96


def measure_harness(model: nn.Module, tokenizer: Any, options: HarnessConfig) -> dict[str, Metric]:
    """`METRIC:TASK` for every metric that the harness reports of these tasks (a filter's name follows a comma).

    Raises:
        DataError: no such task, or its data cannot be had.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=options.include)
    unknown = [task for task in options.tasks if task not in manager.all_tasks]
    if unknown:
        raise DataError(f"harness.tasks: {', '.join(unknown)}", "the harness knows no such task",
                        "See `lm-eval ls tasks`, or give the folder of its definition as harness.include")  # fmt: skip
    lm = HFLM(pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=options.batch)
    try:
        found = lm_eval.simple_evaluate(
            model=lm,
            tasks=list(options.tasks),
            num_fewshot=options.fewshot,
            limit=options.limit,
            apply_chat_template=options.chat_template,
            task_manager=manager,
            log_samples=False,
            bootstrap_iters=1000,
        )
    except (OSError, ValueError) as error:
        raise DataError(f"harness.tasks: {', '.join(options.tasks)}", " ".join(str(error).split())[:300],
                        "Where the hub is out of reach, give definitions that read local files as "
                        "harness.include") from error  # fmt: skip
    return {
        name: metric
        for task, results in found["results"].items()
        for name, metric in metrics_of(task, results, found, version=lm_eval.__version__).items()
    }


def metrics_of(task: str, results: dict[str, Any], found: dict[str, Any], *, version: str) -> dict[str, Metric]:
    """The harness's `{"acc,none": …, "acc_stderr,none": …}` of one task, by our names."""
    shots, rows = found["n-shot"].get(task), found["n-samples"].get(task, {}).get("effective")
    protocol = f"lm-eval {version}, {shots}-shot, {rows} rows"
    metrics: dict[str, Metric] = {}
    for key, value in results.items():
        measure, _, kind = key.partition(",")
        if not isinstance(value, int | float) or measure.endswith("_stderr") or not kind:
            continue
        error = results.get(f"{measure}_stderr,{kind}")
        margin = NORMAL_95 * error if isinstance(error, int | float) and math.isfinite(error) else 0.0
        name = f"{measure}:{task}" if kind == "none" else f"{measure}:{task},{kind}"
        metrics[name] = Metric(float(value), float(value - margin), float(value + margin), protocol)
    return metrics
