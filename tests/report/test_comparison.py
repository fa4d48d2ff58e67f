"""Runs side by side: whose rows, whose figures, and what cannot be compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bitdistill_ray.report.comparison import main
from bitdistill_ray.runs import RunFolder
from tests.report.test_report import Page
from tests.road import tiny_config

WINDOWS = "9 windows"


def metric(value: float, protocol: str = WINDOWS) -> dict[str, Any]:
    return {"value": value, "low": value, "high": value, "protocol": protocol}


def model(name: str, kl: float | None, protocol: str = WINDOWS) -> dict[str, Any]:
    metrics = {
        "ppl:wiki": metric(20 + (kl or 0), protocol),
        **({} if kl is None else {"kl:wiki": metric(kl, protocol)}),
    }
    return {"name": name, "bits_per_weight": 2.25, "bytes": 1, "bytes_without_embeddings": 1, "metrics": metrics}


def a_run(root: Path, name: str, kl: float, *, steps: int = 3, protocol: str = WINDOWS) -> str:
    run = RunFolder(tiny_config(root, f"data={root}", run=str(root / name)))
    run.begin()
    models = [
        model("teacher", None, protocol),
        model("round-to-nearest", 5.0, protocol),
        model("trained", kl, protocol),
    ]
    run.storage.write_bytes("evaluation.json", json.dumps({"models": models}).encode())
    rows = [{"stage": "distill", "step": step, "tokens": 1000, "seconds": 2.0, "data_wait_s": 0.5,
             **({"kl:wiki": kl + 1 / (step + 1)} if step % 2 else {})} for step in range(steps)]  # fmt: skip
    run.storage.write_bytes("metrics.jsonl", "\n".join(map(json.dumps, rows)).encode())
    return str(root / name)


def test_a_row_for_each_run_and_the_baselines_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [a_run(tmp_path, "ce", 1.5), a_run(tmp_path, "kl|b", 0.75, steps=5)]
    capsys.readouterr()  # what was said while the models were made
    assert main([*runs, "--html", str(tmp_path / "all.html")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in lines] == [
        ["student", "bits", "tokens", "training", "ppl:wiki", "kl:wiki"],
        ["---"] * 6,
        ["teacher", "2.250", "0", "–", "20", "–"],
        ["round-to-nearest", "2.250", "0", "–", "25", "5"],
        ["ce", "2.250", "3,000", "8 s", "21.5", "1.5"],
        ["kl∣b", "2.250", "5,000", "12 s", "20.75", "0.75"],
    ]
    html = (tmp_path / "all.html").read_text(encoding="utf-8")
    assert Page(html).open == []
    assert "KL to the teacher: wiki by tokens" in html
    assert "tokens 4,000: kl|b 1" in html  # 0.75 + 1/4 after four steps of 1,000


@pytest.mark.parametrize("fault", ["no evaluation", "other windows", "no run"])
def test_what_cannot_be_compared_is_refused(fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [
        a_run(tmp_path, "a", 1.0),
        a_run(tmp_path, "b", 1.0, protocol="3 windows" if fault == "other windows" else WINDOWS),
    ]
    if fault == "no evaluation":
        (tmp_path / "b" / "evaluation.json").unlink()
    assert main([*runs, *([str(tmp_path / "c")] if fault == "no run" else [])]) == 2
    said = capsys.readouterr().err
    assert {"no evaluation": "no evaluation.json", "other windows": "measured ppl:wiki as '3 windows'",
            "no run": "holds no config.yaml"}[fault] in said  # fmt: skip
