"""The table that people read at the end of a run."""

from __future__ import annotations

from collections.abc import Sequence

from bitdistill_ray.evaluation.metric import ModelReport


def print_table(reports: Sequence[ModelReport]) -> None:
    """Print one row a model: bits, bytes, and every metric that some model has."""
    print(table(reports), flush=True)


def table(reports: Sequence[ModelReport]) -> str:
    """The same as text; a metric that a model does not have is a dash."""
    names = list(dict.fromkeys(name for report in reports for name in report.metrics))
    rows = [["model", "bits/weight", "MB", "MB without embeddings", *names]]
    for report in reports:
        sizes = [f"{report.bits_per_weight:.3f}", f"{report.bytes / 1e6:.1f}",
                 f"{report.bytes_without_embeddings / 1e6:.1f}"]  # fmt: skip
        metrics = [_cell(report.metrics[name].value) if name in report.metrics else "-" for name in names]
        rows.append([report.name, *sizes, *metrics])
    return align(rows)


def align(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells in columns: the first to the left, the others to the right; a rule under the head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
             for row in rows]  # fmt: skip
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _cell(value: float) -> str:
    return f"{value:,.2f}" if value >= 10 else f"{value:.4f}"
