"""The page: what happened in one screen, then curves, weights, evaluation, recipe, machine."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

from bitdistill_ray.report.axis import figure
from bitdistill_ray.report.curves import rows_table, stage_charts
from bitdistill_ray.report.gather import RunFacts, gather, record_machine
from bitdistill_ray.report.histogram import weight_histogram
from bitdistill_ray.report.markup import Markup, element, join, table
from bitdistill_ray.runs import RunFolder

FILE = "report.html"
__all__ = ["record_machine", "render", "write_report"]


def write_report(run: RunFolder) -> str:
    """Write `report.html` into the run's folder; returns its URL.

    Raises:
        StorageError: the folder cannot be read or written.
    """
    run.storage.write_bytes(FILE, render(gather(run)).encode())
    return run.storage.url_of(FILE)


def render(facts: RunFacts) -> str:
    """The whole file."""
    name = facts.url.rstrip("/").rpartition("/")[2] or facts.url
    return document(f"{name}: a bitdistill run", _header(facts, name), element("main", *_sections(facts)))


def document(title: str, *body: Markup) -> str:
    """A whole HTML file with the report's style in it."""
    style = files("bitdistill_ray.report").joinpath("style.css").read_text(encoding="utf-8")
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", Markup(style)),
    )
    return f"<!DOCTYPE html>\n{element('html', head, element('body', *body), lang='en')}\n"


def _header(facts: RunFacts, name: str) -> Markup:
    quant = facts.config.quant
    size = f" {quant.group_size}" if quant.group_size else ""
    model = facts.config.model
    source = f"{model.teacher} → {model.student}" if model.student else model.teacher
    state = ("finished", "ok") if facts.finished else ("not finished", "open")
    return element(
        "header",
        element("h1", name, " ", element("span", state[0], class_=f"state {state[1]}")),
        element("p", element("strong", source), f" as {quant.format}, one scale per {quant.granularity}{size}"),
        element("p", facts.url, class_="note"),
        *(element("p", note, class_="notice") for note in facts.notes),
        _tiles(facts),
    )


def _tiles(facts: RunFacts) -> Markup | None:
    """The last trained stage in a few large figures."""
    if not facts.rows:
        return None
    name, rows = list(facts.rows.items())[-1]
    seconds = sum(row.get("seconds", 0) + (row.get("data_wait_s") or 0) for row in rows)
    tokens = sum(row.get("tokens", 0) for row in rows)
    waited = sum(row.get("teacher_wait_s") or 0 for row in rows)
    figures = [
        (f"loss, {name}", f"{figure(rows[0]['loss'])} → {figure(rows[-1]['loss'])}"),
        ("steps", f"{len(rows):,}"),
        ("target tokens", figure(float(tokens))),
        ("tokens/s", figure(tokens / seconds) if seconds else "–"),
        ("waiting for teachers", f"{100 * waited / seconds:.1f} %" if seconds else "–"),
    ]
    for model in facts.evaluation[-1:]:
        figures.append(("bits per weight", f"{model['bits_per_weight']:.3f}"))
    tiles = [element("div", element("dt", label), element("dd", value)) for label, value in figures]
    return element("dl", *tiles, class_="tiles")


def _sections(facts: RunFacts) -> list[Markup]:
    sections = [
        _section(f"Training: {stage}", stage_charts(rows), rows_table(rows)) for stage, rows in facts.rows.items()
    ]
    if facts.histograms:
        sections.append(_weights(facts))
    if facts.evaluation:
        sections.append(_evaluation(facts.evaluation))
    sections.append(_section("Stages", _stages(facts)))
    if facts.machine:
        sections.append(_machine(facts.machine))
    recipe = element("details", element("summary", "Every key, as resolved"), element("pre", facts.recipe))
    sections.append(_section("Recipe", recipe))
    return sections


def _weights(facts: RunFacts) -> Markup:
    trained = any(h.after for h in facts.histograms)
    legend = element(
        "p",
        element("span", element("i", class_="swatch before"), "before training"),
        element("span", element("i", class_="swatch series-0"), "after training") if trained else None,
        element("span", element("i", class_="swatch level"), "levels of the grid"),
        element("span", element("i", class_="swatch cut"), "cuts between two codes"),
        class_="legend",
    )
    note = "Latent weights in units of their scale, by kind of layer; the outermost bins hold what lies beyond."
    charts = element("div", *(weight_histogram(h) for h in facts.histograms), class_="histograms")
    return _section("Weights", element("p", note, class_="note"), legend, charts)


def _evaluation(models: list[dict[str, Any]]) -> Markup:
    names = list(dict.fromkeys(name for model in models for name in model["metrics"]))
    rows: list[list[object]] = []
    for model in models:
        cells: list[object] = [model["name"], f"{model['bits_per_weight']:.3f}", f"{model['bytes'] / 1e6:,.1f}"]
        for name in names:
            metric = model["metrics"].get(name)
            cells.append("–" if metric is None else _measured(metric))
        rows.append(cells)
    protocols = {name: m["metrics"][name]["protocol"] for m in models for name in m["metrics"]}
    said = [element("li", element("b", name), f": {text}") for name, text in protocols.items()]
    return _section(
        "Evaluation",
        table(["model", "bits/weight", "MB", *names], rows, "Each value with its 95 % interval"),
        element("details", element("summary", "How each was measured"), element("ul", *said)),
    )


def _measured(metric: dict[str, Any]) -> Markup:
    interval = f"{figure(metric['low'])} to {figure(metric['high'])}"
    return join(figure(metric["value"]), element("small", interval))


def _stages(facts: RunFacts) -> Markup:
    rows: list[list[object]] = []
    for name, stage in facts.config.stages.items():
        record = facts.done.get(name)
        facts_of = dict((record or {}).get("facts", {}))
        seconds = facts_of.pop("seconds", None)
        short = {k: v for k, v in facts_of.items() if isinstance(v, int | float | str)}
        said = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in short.items())
        state = "finished" if record else "not finished"
        rows.append([name, stage.kind, state, figure(seconds), element("span", said, class_="words")])
    return table(["stage", "kind", "state", "seconds", "facts"], rows)


def _machine(about: Any) -> Markup:
    machine = about.get("machine", {})
    gpus = machine.get("gpus") or []
    pairs = {
        "commit": about.get("commit") or "an installed package",
        **{k: (", ".join(gpus) or "none") if k == "gpus" else v for k, v in machine.items()},
        **about.get("versions", {}),
    }
    rows: list[list[object]] = [
        [k.replace("_", " "), v if isinstance(v, str) else json.dumps(v)] for k, v in pairs.items()
    ]
    return _section(
        "Machine and versions", element("p", "Of the driver.", class_="note"), table(["what", "value"], rows)
    )


def _section(title: str, *content: Markup) -> Markup:
    return element("section", element("h2", title), *content)
