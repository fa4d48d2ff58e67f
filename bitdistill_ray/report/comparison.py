"""bitdistill compare RUN RUN … [--against NAME] [--html FILE]    runs side by side: a Markdown table, and curves.

The table has the teacher and the untrained baselines once, from the first run that measured them, and the trained
student of every run: bits, tokens, and on each text perplexity, KL to the teacher and agreement with it.  Runs called
NAME-seed0, NAME-seed1, … also come as their mean over seeds, with paired intervals (`pooled.py`).  The page draws over
training tokens what `monitor.quality_every` measured while they trained.  A RUN is a folder, local or at a URL.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from bitdistill_ray.errors import BitdistillError, ConfigError
from bitdistill_ray.report.axis import figure
from bitdistill_ray.report.chart import Series, line_chart
from bitdistill_ray.report.command import open_run
from bitdistill_ray.report.curves import QUALITY
from bitdistill_ray.report.gather import RunFacts, gather
from bitdistill_ray.report.markup import Markup, element, table
from bitdistill_ray.report.page import document
from bitdistill_ray.report.pooled import HEADS, TEACHER, TRAINED, pooled

Cells = list[str]


def compare(runs: Sequence[RunFacts]) -> tuple[Cells, list[Cells]]:
    """(heads, rows) of the table.

    Raises:
        ConfigError: a run that has measured nothing, or on other windows than the first.
    """
    metrics, protocols = list[str](), dict[str, str]()
    for facts in runs:
        if not facts.evaluation:
            raise ConfigError(facts.url, "has no evaluation.json", "Let it come to its `evaluate` stage")
        for model in facts.evaluation:
            for name, metric in model["metrics"].items():
                found, first = metric["protocol"], protocols.setdefault(name, metric["protocol"])
                if found != first:
                    raise ConfigError(facts.url, f"measured {name} as {found!r}, another run as {first!r}",
                                      "Compare runs with the same `evaluate` stage")  # fmt: skip
                metrics += [] if name in metrics else [name]
    rows: list[Cells] = []
    seen: set[str] = set()
    for facts in runs:
        for model in facts.evaluation:
            if model["name"] != TRAINED and model["name"] not in seen:
                seen.add(model["name"])
                rows.append(_row(model["name"], model, metrics, tokens=0, seconds=None))
    for facts in runs:
        tokens, seconds = _trained(facts)
        made = TRAINED if any(model["name"] == TRAINED for model in facts.evaluation) else _tuned(facts)
        rows += [_row(facts.name, model, metrics, tokens=tokens, seconds=seconds)
                 for model in facts.evaluation if model["name"] == made]  # fmt: skip
    return ["student", "bits", "tokens", "training", *metrics], rows


def _tuned(facts: RunFacts) -> str | None:
    """The model of a run that trained no student but its teacher."""
    return TEACHER if any(stage.kind == "finetune" for stage in facts.config.stages.values()) else None


def curves(runs: Sequence[RunFacts]) -> Iterator[Markup]:
    """A chart for each text and each of perplexity, KL and agreement, with a curve for each run."""
    keys = dict.fromkeys(key for facts in runs for row in _rows(facts) for key in row)
    for prefix, title, note in QUALITY:
        for key in (key for key in keys if key.startswith(prefix)):
            series = [Series(facts.name, _points(facts, key)) for facts in runs]
            yield line_chart(f"{title}: {key.removeprefix(prefix)}", series, note=note, over="tokens")


def _points(facts: RunFacts, key: str) -> tuple[tuple[float, float], ...]:
    rows = _rows(facts)
    tokens = accumulate(row["tokens"] for row in rows)
    return tuple((float(t), float(row[key])) for t, row in zip(tokens, rows, strict=True) if row.get(key) is not None)


def _rows(facts: RunFacts) -> list[dict[str, Any]]:
    return [row for rows in facts.rows.values() for row in rows]


def _trained(facts: RunFacts) -> tuple[int, float]:
    """Target tokens of all training stages of a run, and the seconds of their steps."""
    rows = _rows(facts)
    return (sum(row["tokens"] for row in rows),
            sum(row.get("seconds", 0.0) + (row.get("data_wait_s") or 0.0) for row in rows))  # fmt: skip


def _row(name: str, model: dict[str, Any], metrics: Sequence[str], *, tokens: int, seconds: float | None) -> Cells:
    values = [figure(model["metrics"][m]["value"]) if m in model["metrics"] else "–" for m in metrics]
    took = "–" if seconds is None else f"{seconds:,.0f} s"
    return [name, f"{model['bits_per_weight']:.3f}", f"{tokens:,}", took, *values]


def markdown(heads: Cells, rows: Sequence[Cells]) -> str:
    """The table for a README."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '∣') for cell in line)} |" for line in lines)


def page(runs: Sequence[RunFacts], heads: Cells, rows: Sequence[Cells]) -> str:
    """The table and the curves as one HTML file."""
    charts = list(curves(runs))
    said = "" if charts else "No run measured its student while it trained (monitor.quality_every)."
    header = element("header", element("h1", f"{len(runs)} runs side by side"), element("p", said, class_="note"))
    urls = element("ul", *(element("li", element("b", facts.name), f": {facts.url}") for facts in runs))
    body = [element("section", element("h2", "After training"), table(heads, [list(row) for row in rows]), urls)]
    if charts:
        body.append(element("section", element("h2", "While training"), element("div", *charts, class_="charts")))
    return document("bitdistill runs side by side", header, element("main", *body))


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit status, 2 after an error that the user can mend."""
    command = argparse.ArgumentParser(prog="bitdistill compare", description=__doc__.partition("\n\n")[2])
    command.add_argument("runs", nargs="+", metavar="RUN")
    command.add_argument("--against", metavar="NAME", help="the gaps of means over seeds are to these runs")
    command.add_argument("--html", metavar="FILE", help="also write the table and the curves as a page")
    options = command.parse_args(argv)
    try:
        runs = [gather(open_run(url), weights=False) for url in options.runs]
        heads, rows = compare(runs)
        means = pooled(runs, options.against)
    except BitdistillError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(markdown(heads, rows))
    if means:
        print(f"\n{markdown(HEADS, means)}")
    if options.html:
        Path(options.html).write_text(page(runs, heads, rows), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
