"""`report.html` of real folders: it parses, needs no network, shows the rows' figures, and survives a cut run."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from bitdistill_ray.cli import main
from bitdistill_ray.core import Format, QuantSpec
from bitdistill_ray.model.student import load_student, save_student
from bitdistill_ray.model.surgery import quantize_linears
from bitdistill_ray.report.axis import figure
from bitdistill_ray.report.command import open_run
from bitdistill_ray.report.gather import gather
from bitdistill_ray.report.page import record_machine, write_report
from bitdistill_ray.report.weights import weight_histograms
from bitdistill_ray.runs import RunFolder, StageRecord
from tests.road import tiny_config
from tests.tiny_models import tiny_model, tiny_tokenizer

VOID = {"meta", "br", "hr", "line", "rect", "path", "circle"}
FETCHES = ("src", "href", "xlink:href", "srcset", "action", "data", "poster")
HOSTILE = 'corpus/<script>alert("x")</script>&amp;.jsonl'


class Page(HTMLParser):
    """Checks that elements nest, and collects text and attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in VOID
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def row(step: int) -> dict[str, Any]:
    return {"stage": "distill", "step": step, "loss": 3.0 - 0.0101 * step, "ce": 2.0, "cakld": 1.0 / (step + 1),
            "learning_rate": 1e-4, "grad_norm": 0.5, "tokens": 2000, "seconds": 2.0, "tokens_per_s": 1000.0,
            "mfu": None, "data_wait_s": 0.1, "teacher_wait_s": 0.4, "teacher_bytes": 10**8, "retries": 0,
            **({"flip_rate": 0.01, "flip_steps": 5, "zeros": 0.3} if step % 5 == 4 else {})}  # fmt: skip


def metric(value: float) -> dict[str, Any]:
    return {"value": value, "low": value * 0.9, "high": value * 1.1, "protocol": "windows of 32 <tokens>"}


@pytest.fixture
def cut(tmp_path: Path) -> RunFolder:
    """A run that died in its training: refined, 120 rows, the last line cut short."""
    run = RunFolder(tiny_config(tmp_path, f"data={json.dumps(HOSTILE)}", "quant.format=ternary", "stages.write=false"))
    run.begin()
    record_machine(run)
    model = tiny_model(seed=1)
    quantize_linears(model, QuantSpec(format=Format.TERNARY, group_size=16))
    with run.publish("stages/refine/student") as folder:
        save_student(folder, model, tiny_tokenizer())
    run.finish(StageRecord("refine", "refine", {"student": "stages/refine/student"}, {"linears": 14, "seconds": 3.2}))
    lines = [json.dumps(row(step)) for step in range(120)]
    run.storage.write_bytes("metrics.jsonl", ("\n".join(lines) + '\n{"stage": "distill", "st').encode())
    return run


@pytest.fixture
def whole(cut: RunFolder) -> RunFolder:
    """The same run at its end."""
    before = cut.fetch("stages/refine/student")
    model, tokenizer = load_student(before, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9).add_(0.02)
    with cut.publish("stages/distill/student") as folder:
        save_student(folder, model, tokenizer)
    records = {"distill": {"student": "stages/distill/student"}}
    for name, stage in cut.config.stages.items():
        if name != "refine":
            cut.finish(StageRecord(name, stage.kind, records.get(name, {}), {"seconds": 1.0}))
    models = [{"name": name, "bits_per_weight": 1.7, "bytes": 10**6, "bytes_without_embeddings": 10**5,
               "metrics": {"kl:excerpt": metric(0.1234)}} for name in ("teacher", "trained")]  # fmt: skip
    cut.storage.write_bytes("evaluation.json", json.dumps({"models": models}).encode())
    return cut


def html_of(run: RunFolder) -> str:
    return Path(write_report(run)).read_text(encoding="utf-8")


def test_it_is_one_file_that_parses_and_fetches_nothing(whole: RunFolder) -> None:
    html = html_of(whole)
    page = Page(html)
    assert html.startswith("<!DOCTYPE html>")
    for tag, attributes in page.seen:
        assert tag not in {"script", "link", "img", "iframe", "object", "embed"}
        assert not set(attributes) & set(FETCHES)
    assert "@import" not in html
    assert "url(" not in html
    assert not re.search(r"https?://", html)
    for svg in re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL):
        drawn = ElementTree.fromstring(svg)
        assert drawn.get("role") == "img"
        assert drawn.get("aria-label")
        assert "nan" not in svg.lower().replace("aria", "")


def test_it_shows_the_rows_figures(whole: RunFolder) -> None:
    page = Page(html_of(whole))
    said = "\n".join(page.text)
    for step in (0, 119):
        assert figure(row(step)["loss"]) in page.text
        assert figure(row(step)["cakld"]) in page.text
    assert "3 → 1.798" in said  # the first and the last loss
    assert "step 119: loss 1.798" in said  # what a pointer over the curve is told
    for chart in ("Loss", "Loss: ce", "Loss: cakld", "Learning rate", "Gradient norm", "Tokens per second", "Waiting",
                  "From teachers", "Codes that change", "Weights at zero", "q_proj", "down_proj"):  # fmt: skip
        assert chart in page.text
    assert "Model FLOPs utilisation" not in page.text  # never measured
    assert "finished" in page.text
    assert "0.1234" in page.text
    assert "0.1111 to 0.1357" in page.text


def test_text_of_the_run_cannot_become_markup(whole: RunFolder) -> None:
    html = html_of(whole)
    assert "<script" not in html
    assert HOSTILE in "".join(Page(html).text)
    assert "windows of 32 &lt;tokens&gt;" in html


def test_a_cut_run_gives_a_report_that_says_so(cut: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", cut.storage.url]) == 0
    assert capsys.readouterr().out.strip() == f"{cut.storage.url}/report.html"
    said = "\n".join(Page(Path(cut.storage.url, "report.html").read_text(encoding="utf-8")).text)
    assert "not finished" in said
    assert re.search(r"The run is not finished: .*distill.* have not ended", said)
    assert "1 of 121 lines of metrics.jsonl cannot be read" in said
    assert figure(row(119)["loss"]) in said
    assert "before training" in said
    assert "after training" not in said


def test_a_run_that_only_began_gives_one_too(tmp_path: Path) -> None:
    run = RunFolder(tiny_config(tmp_path))
    run.begin()
    assert "No step was trained yet." in "\n".join(Page(html_of(run)).text)


def test_a_folder_that_is_no_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "holds no config.yaml" in capsys.readouterr().err


def test_the_report_reads_a_run_that_was_moved(whole: RunFolder, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    Path(whole.storage.url).rename(moved)
    facts = gather(open_run(str(moved)))
    assert facts.url == str(moved)
    assert facts.finished
    assert len(facts.rows["distill"]) == 120


def test_histograms_count_the_weights_in_units_of_their_scale(whole: RunFolder) -> None:
    before, after = (whole.fetch(f"stages/{name}/student") for name in ("refine", "distill"))
    [found] = [h for h in weight_histograms(before, after) if h.kind == "q_proj"]
    model, _ = load_student(before, dtype=torch.float32)
    relative = []
    for name, linear in model.named_modules():
        if name.endswith("q_proj"):
            groups = linear.weight.detach().unflatten(1, (-1, 16))
            relative.append((groups / groups.abs().mean(-1, keepdim=True).half().float()).flatten())
    counted = torch.histc(
        torch.cat(relative).clamp(-found.reach, found.reach), len(found.before), -found.reach, found.reach
    )
    assert found.levels == (-1.0, 0.0, 1.0)
    assert found.cuts == (-0.5, 0.5)
    near = ((torch.cat(relative).abs() - 0.5).abs() <= 0.1).float().mean().item()
    assert found.near(found.cuts, 0.1, found.before) == pytest.approx(near, abs=0.05)  # of whole bins
    assert found.weights == counted.sum()
    assert (counted / counted.sum() - torch.tensor(found.before)).abs().max() < 2e-3
    assert sum(found.after) == pytest.approx(1.0)
    assert found.after != found.before
