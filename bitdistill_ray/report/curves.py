"""Which curves a training stage has: from the rows of `metrics.jsonl` to charts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from bitdistill_ray.report.axis import figure
from bitdistill_ray.report.chart import Series, line_chart
from bitdistill_ray.report.markup import Markup, element, join, table
from bitdistill_ray.student.headline import duration, loss_parts

Row = dict[str, Any]
Value = Callable[[Row], float | None]
TABLE_ROWS = 40
COLUMNS = ("loss", "learning_rate", "grad_norm", "tokens", "tokens_per_s", "teacher_wait_s", "data_wait_s")
QUALITY = (("ppl:", "Perplexity", "on held-out text"), ("kl:", "KL to the teacher", "nats a token, on held-out text"),
           ("agreement:", "Agreement with the teacher", "share of tokens, on held-out text"))  # fmt: skip


def stage_charts(rows: Sequence[Row]) -> Markup:
    """Every chart that these rows have something for."""
    parts = list(loss_parts(rows[0]))
    charts = [line_chart("Loss", [series("loss", rows, of("loss"))])]
    if len(parts) > 1:
        charts += [line_chart(f"Loss: {n}", [series(n, rows, of(n))], note="without its weight") for n in parts]
    charts += [
        line_chart("Learning rate", [series("learning rate", rows, of("learning_rate"))], from_zero=True),
        line_chart("Gradient norm", [series("norm", rows, of("grad_norm"))], note="before clipping", from_zero=True),
        line_chart("Tokens per second", [series("tokens/s", rows, of("tokens_per_s"))], from_zero=True),
        line_chart(
            "Waiting",
            [series("for teachers", rows, _share("teacher_wait_s")), series("for data", rows, _share("data_wait_s"))],
            note="% of a step's time, first worker",
            from_zero=True,
        ),
    ]
    if _any(rows, "mfu"):
        mfu = series("MFU", rows, lambda row: _times(row.get("mfu"), 100))
        charts.append(line_chart("Model FLOPs utilisation", [mfu], note="% of bf16 peak", from_zero=True))
    if _any(rows, "teacher_bytes"):
        wire = series("GB/s", rows, lambda row: _times(row.get("teacher_bytes"), 1e-9 / max(duration(row), 1e-9)))
        charts.append(line_chart("From teachers", [wire], note="GB/s, first worker", from_zero=True))
    if _any(rows, "flip_rate"):
        flips = series("codes", rows, lambda row: _times(row.get("flip_rate"), 100 / max(1, row.get("flip_steps", 1))))
        charts.append(line_chart("Codes that change", [flips], note="% in a step", from_zero=True))
    if _any(rows, "zeros"):
        charts.append(line_chart("Weights at zero", [series("zeros", rows, lambda r: _times(r.get("zeros"), 100))],
                                 note="%"))  # fmt: skip
    if _any(rows, "quant_strength"):
        strength = series("strength", rows, of("quant_strength"))
        charts.append(line_chart("Strength of the quantisation", [strength], note="1 is all of it", from_zero=True))
    if _any(rows, "relation_weight"):
        charts.append(line_chart("Weight of relations", [series("weight", rows, of("relation_weight"))],
                                 note="set by gradients", from_zero=True))  # fmt: skip
    if _any(rows, "near_cut"):
        near = series("weights", rows, lambda r: _times(r.get("near_cut"), 100))
        charts.append(line_chart("Weights near a cut", [near], note="%, within a tenth of a scale of another code"))
    for prefix, title, note in QUALITY:
        texts = [name for name in dict.fromkeys(key for row in rows for key in row) if name.startswith(prefix)]
        if texts:
            curves = [series(name.removeprefix(prefix), rows, of(name)) for name in texts]
            charts.append(line_chart(title, curves, note=note))
    norms = [name for name in parts if _any(rows, f"grad_norm_{name}")]
    if norms:
        curves = [series(name, rows, of(f"grad_norm_{name}")) for name in norms]
        charts.append(line_chart("Gradient norm by loss", curves, note="each with its weight", from_zero=True))
    if _any(rows, "grad_norm_ratio"):
        ratio = series("ratio", rows, of("grad_norm_ratio"))
        note = f"{norms[1]} / {norms[0]}" if len(norms) == 2 else ""
        charts.append(line_chart("Gradient-norm ratio", [ratio], note=note, from_zero=True))
    return element("div", *charts, class_="charts")


def rows_table(rows: Sequence[Row]) -> Markup:
    """Rows as figures, evenly chosen, the first and the last among them."""
    stride = -(-max(1, len(rows) - 1) // (TABLE_ROWS - 1))
    chosen = [*rows[:-1:stride], rows[-1]]
    names = [name for name in (*COLUMNS[:1], *loss_parts(rows[0]), *COLUMNS[1:]) if any(name in row for row in rows)]
    body: list[list[object]] = [[row["step"], *(figure(row.get(name)) for name in names)] for row in chosen]
    shown = f"{len(chosen)} of {len(rows)} steps" if len(chosen) < len(rows) else f"all {len(rows)} steps"
    return element("details", element("summary", f"The figures: {shown}"), join(table(["step", *names], body)))


def series(name: str, rows: Sequence[Row], value: Value) -> Series:
    """A curve over the rows that have the value."""
    found = [(float(row["step"]), value(row)) for row in rows]
    return Series(name, tuple((step, float(v)) for step, v in found if v is not None))


def of(key: str) -> Value:
    """The row's own figure."""
    return lambda row: row.get(key)


def _share(key: str) -> Value:
    return lambda row: _times(row.get(key), 100 / max(duration(row), 1e-9))


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _any(rows: Sequence[Row], key: str) -> bool:
    return any(row.get(key) for row in rows)
