"""python -m bitdistill_ray.evaluate MODEL … --teacher SOURCE [--text NAME=PATH[:COLUMN]] [--task YAML] [--json FILE]

Measures models beside a teacher: perplexity, KL and top-1 agreement on texts, accuracy on tasks, each with the central
95 % of a bootstrap.  A MODEL is a packed student, the folder of a training stage, or a plain model (Hugging Face id,
folder, GGUF file, wheel:…), local or at a URL.  Without --text and --harness, the excerpt that ships is measured.  A
task is one that ships (sst2, qnli, mnli, cnn-dailymail; its rows are the hub's) or a YAML file with the keys of
`stages.evaluate.tasks` (name, path, template, labels, label_column, limit; or task and path) or, with a
reference_column, those of `stages.evaluate.writing`: texts to write, scored by ROUGE and BLEU.  What rows can be
compared one by one also has its gap to the teacher, `accuracy_gap:TASK` and so on, with a paired interval, and
`agreement:TASK`, the share of labels predicted alike (with a latent student as --teacher: what packing changed).
--harness names tasks of lm-evaluation-harness, `:N` solved examples in front: `--harness arc_easy --harness gsm8k:5`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import yaml
from pydantic import ValidationError

from bitdistill_ray.config import Dtype
from bitdistill_ray.errors import BitdistillError, ConfigError
from bitdistill_ray.evaluate_config import HarnessConfig, TaskConfig, TextConfig, WritingConfig
from bitdistill_ray.shipped import shipped
from bitdistill_ray.task_config import TASKS, with_task

if TYPE_CHECKING:
    from bitdistill_ray.evaluation.metric import ModelReport


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(prog="bitdistill evaluate", description=__doc__.partition("\n\n")[2])
    command.add_argument("models", nargs="+", metavar="MODEL")
    command.add_argument("--teacher", required=True, metavar="SOURCE")
    command.add_argument("--text", action="append", default=[], metavar="NAME=PATH[:COLUMN]", help="may be repeated")
    between = TextConfig.model_fields["join"].default
    command.add_argument("--join", default=between, metavar="TEXT", help="between the rows of a text; '' for wikitext")
    command.add_argument("--task", action="append", default=[], metavar="NAME|YAML", help="may be repeated")
    command.add_argument("--harness", action="append", default=[], metavar="TASK,…[:N]", help="may be repeated")
    command.add_argument("--include", metavar="FOLDER", help="of further tasks' definitions for the harness")
    command.add_argument("--limit", type=int, help="of each of the harness's tasks, at most so many rows")
    command.add_argument("--context", type=int, default=512, help="tokens of one window of a text (default 512)")
    command.add_argument("--max-tokens", type=int, help="of each text, at most so many")
    names = ", ".join(Dtype)
    command.add_argument("--dtype", type=Dtype, default=Dtype.AUTO, choices=list(Dtype), metavar="DTYPE", help=names)
    command.add_argument("--device", help="cpu, cuda (default: a GPU where there is one)")
    command.add_argument("--json", metavar="FILE")
    return command


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table and write the JSON; returns the exit status, 2 after an error that the user can mend."""
    options = parser().parse_args(argv)
    try:
        reports = evaluate(options)
        from bitdistill_ray.evaluation.suite import as_json
        from bitdistill_ray.evaluation.table import print_table
        from bitdistill_ray.storage import write_json

        print_table(reports)
        if options.json:
            write_json(options.json, as_json(reports))
    except BitdistillError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def evaluate(options: argparse.Namespace) -> list[ModelReport]:
    """Measure the teacher, then each model.  Raises BitdistillError."""
    texts = [text_config(text, options.join) for text in options.text]
    task_configs = [task_config(path) for path in options.task]
    harness = [harness_config(argument, options) for argument in options.harness]

    import torch

    from bitdistill_ray.data.sources import Source
    from bitdistill_ray.data.tables import read_rows, read_texts
    from bitdistill_ray.evaluation.candidate import load_candidate
    from bitdistill_ray.evaluation.suite import TEACHER, Suite, excerpt
    from bitdistill_ray.hardware import compute_dtype, local_device

    device = torch.device(options.device) if options.device else local_device()
    dtype, why = compute_dtype(options.dtype, device)
    print(f"on {device} in {str(dtype).removeprefix('torch.')} ({why})", file=sys.stderr)
    read = {t.name: t.join.join(read_texts(Source(t.path, text_column=t.text_column))) for t in texts}
    rows = [(task, [r for path in task.path for r in read_rows(Source(path))][: task.limit]) for task in task_configs]
    labelled = [(task, found) for task, found in rows if isinstance(task, TaskConfig)]
    written = [(task, found) for task, found in rows if isinstance(task, WritingConfig)]
    teacher = load_candidate(options.teacher, dtype=dtype, device=device)
    texts_read = read or ({} if harness else {"excerpt": excerpt()})
    suite = Suite.of(texts_read, labelled, teacher.tokenizer, context=options.context, max_tokens=options.max_tokens,
                     harness=harness, writing=written)  # fmt: skip
    reports = [suite.report(TEACHER, teacher, teacher)]
    for source in options.models:
        print(f"measuring {source}", file=sys.stderr)
        candidate = load_candidate(source, dtype=dtype, device=device)
        reports.append(suite.report(source, candidate, teacher, beside=reports[0]))
    return reports


def text_config(argument: str, join: str) -> TextConfig:
    """NAME=PATH[:COLUMN]; a colon inside a URL or before a slash is part of the path.

    Raises:
        ConfigError: it has no name or no path.
    """
    name, equals, place = argument.partition("=")
    path, colon, column = place.rpartition(":")
    if not colon or not column.isidentifier():
        path, column = place, TextConfig.model_fields["text_column"].default
    if not (name and equals and path):
        raise ConfigError("--text", f"{argument!r}", "Write NAME=PATH or NAME=PATH:COLUMN")
    return TextConfig(name=name, path=path, text_column=column, join=join)


def harness_config(argument: str, options: argparse.Namespace) -> HarnessConfig:
    """TASK,…[:N].

    Raises:
        ConfigError: N is not a number, or the harness is not installed.
    """
    tasks, colon, shots = argument.partition(":")
    if colon and not shots.isdecimal():
        raise ConfigError("--harness", f"{argument!r}", "Write TASK,… or TASK,…:N with a number N")
    return HarnessConfig(tasks=tuple(tasks.split(",")), fewshot=int(shots) if colon else None,
                         include=options.include, limit=options.limit)  # fmt: skip


def task_config(path: str) -> TaskConfig | WritingConfig:
    """A task that ships, by its name, or from a YAML file: one to write, where it has a column of references.

    Raises:
        ConfigError: not YAML, or not the keys of a task.
        StorageError: it cannot be read.
    """
    from bitdistill_ray.storage import Storage

    folder, _, name = path.rpartition("/")
    section: type[TaskConfig | WritingConfig] = TaskConfig
    try:
        known = path in shipped(TASKS)
        content = with_task(path if known else yaml.safe_load(Storage(folder or ".").read_bytes(name)), split="test")
        if isinstance(content, dict) and {"reference_column", "response_column"} & content.keys():
            section = WritingConfig
        return section.model_validate(content)
    except yaml.YAMLError as error:
        raise ConfigError(path, f"not YAML: {' '.join(str(error).split())}", "Mend the file") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join([path, *map(str, first["loc"])])
        raise ConfigError(where, first["msg"], f"Keys: {', '.join(section.model_fields)}") from None


if __name__ == "__main__":
    sys.exit(main())
