"""Means over seeds and gaps on the same rows, against the same figures made by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from bitdistill_ray.errors import ConfigError
from bitdistill_ray.evaluation.metric import Metric, ModelReport, bootstrap
from bitdistill_ray.report.comparison import main
from bitdistill_ray.report.gather import RunFacts, gather
from bitdistill_ray.report.pooled import pooled
from bitdistill_ray.runs import ROWS, RunFolder
from tests.road import tiny_config

ROW_COUNT = 400


def scored(seed: int, hit: float, like: np.ndarray | None = None) -> np.ndarray:
    """Hits and misses; most rows as `like`."""
    draw = np.random.default_rng(seed)
    own = (draw.random(ROW_COUNT) < hit).astype(float)
    return own if like is None else np.where(draw.random(ROW_COUNT) < 0.95, like, own)


TEACHERS = [scored(seed, 0.9) for seed in (1, 2)]
STUDENTS = [scored(seed, 0.8, teacher) for seed, teacher in zip((3, 4), TEACHERS, strict=True)]


def a_run(root: Path, name: str, rows: dict[str, np.ndarray]) -> RunFacts:
    run = RunFolder(tiny_config(root, f"data={root}", run=str(root / name)))
    run.begin()
    names = [{"name": model, "bits_per_weight": 2.0, "metrics": {}} for model in rows]
    run.storage.write_bytes("evaluation.json", json.dumps({"models": names}).encode())
    scores = {"accuracy:sst2": {model: values.tolist() for model, values in rows.items()}}
    run.storage.write_bytes(ROWS, json.dumps(scores).encode())
    return gather(run, weights=False)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[RunFacts]:
    """Two seeds of a teacher alone, and of a student of each."""
    root = tmp_path_factory.mktemp("runs")
    fp16 = [a_run(root, f"fp16-seed{n}", {"teacher": rows}) for n, rows in enumerate(TEACHERS)]
    both = zip(TEACHERS, STUDENTS, strict=True)
    return [*fp16, *(a_run(root, f"kl-seed{n}", {"teacher": t, "trained": s}) for n, (t, s) in enumerate(both))]


def test_seeds_are_averaged_row_by_row_and_gaps_are_paired(runs: list[RunFacts]) -> None:
    (fp16, kl), (_, same) = pooled(runs), pooled(runs, "fp16")
    teacher, student = np.mean(TEACHERS, axis=0), np.mean(STUDENTS, axis=0)
    assert fp16[:3] == ["fp16", "2", "accuracy:sst2"]
    assert float(fp16[3]) == pytest.approx(teacher.mean(), abs=5e-5)
    assert float(fp16[6]) == 0  # a teacher alone, beside itself
    assert float(kl[3]) == pytest.approx(student.mean(), abs=5e-5)
    ends = sorted(values.mean() for values in STUDENTS)
    assert [float(v) for v in kl[5].split(" – ")] == pytest.approx(ends, abs=5e-5)
    assert float(kl[6]) == pytest.approx((student - teacher).mean(), abs=5e-5)
    gap = bootstrap(student - teacher, "")
    assert [float(v) for v in kl[7].split(" to ")] == pytest.approx([gap.low, gap.high], abs=5e-5)
    alone = bootstrap(student, "")
    assert gap.high - gap.low < 0.5 * (alone.high - alone.low)  # what both find hard cancels
    assert same == kl  # the runs of fp16 are those teachers


def test_one_model_beside_another_on_its_rows() -> None:
    reports = [ModelReport(name, 16.0, 1, 1) for name in ("teacher", "trained")]
    for report, rows in zip(reports, (TEACHERS[0], STUDENTS[0]), strict=True):
        report.add_rows("accuracy:sst2", rows, "400 rows")
    reports[1].metrics["ppl:wiki"] = Metric(1.0, 1.0, 1.0, "")
    reports[1].add_gaps(reports[0])
    assert set(reports[1].metrics) == {"accuracy:sst2", "ppl:wiki", "accuracy_gap:sst2"}
    found = reports[1].metrics["accuracy_gap:sst2"]
    assert found == bootstrap(STUDENTS[0] - TEACHERS[0], found.protocol)
    assert found.protocol.startswith("less teacher, on the same 400 rows")
    assert "rows" not in reports[1].to_dict()


def test_what_cannot_be_pooled_is_refused(runs: list[RunFacts], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no run called 'bf16' kept its rows\. Name one of fp16, kl"):
        pooled(runs, "bf16")
    short = a_run(tmp_path, "short", {"teacher": TEACHERS[0][:7], "trained": STUDENTS[0][:7]})
    with pytest.raises(ConfigError, match=r"short: accuracy:sst2 was measured on 7 rows, .* on 400"):
        pooled([*runs, short], "fp16")


def test_the_command_prints_them_below_its_table(runs: list[RunFacts], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*(facts.url for facts in runs), "--against", "fp16"]) == 0
    _, means = capsys.readouterr().out.split("\n\n")
    assert re.search(r"^\| kl \| 2 \| accuracy:sst2 \| 0\.\d+ \| ", means, re.MULTILINE)
