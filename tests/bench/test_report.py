"""Rows: what a share and a ratio are, and the exact keys that programs read."""

from __future__ import annotations

import json

import pytest

from bitdistill_ray.bench.report import Row, Unit, as_json, table

KEYS = {
    "case", "format", "shape", "threads", "metric", "unit", "value", "limit", "limit_is", "baseline", "baseline_is",
    "share", "ratio",
}  # fmt: skip


@pytest.mark.parametrize(
    ("unit", "share", "ratio"), [(Unit.GB_S, 0.5, 2.0), (Unit.TOKENS_S, 0.5, 2.0), (Unit.MILLISECONDS, 2.0, 0.5)]
)
def test_more_is_better_except_for_times(unit: Unit, share: float, ratio: float) -> None:
    row = Row(case="x", metric="m", unit=unit, value=20.0, limit=40.0, baseline=10.0)
    assert (row.share, row.ratio) == (share, ratio)


def test_what_does_not_apply_is_null() -> None:
    found = Row(case="x", metric="m", unit=Unit.BYTES, value=1.0).to_dict()
    assert set(found) == KEYS
    assert {key for key, value in found.items() if value is None} == KEYS - {"case", "metric", "unit", "value"}


def test_the_file_says_which_code_ran_where() -> None:
    row = Row(case="x", metric="m", unit=Unit.GOPS, value=3.0, shape=(1, 2, 3), limit=6.0, limit_is="the peak")
    content = json.loads(json.dumps(as_json([row])))
    assert set(content) == {"commit", "machine", "versions", "rows"}
    assert {"cpu", "cpus", "memory_gib", "gpus", "os", "kernels"} == set(content["machine"])
    assert {"bitdistill-ray", "python", "torch", "ray"} <= set(content["versions"])
    assert content["rows"] == [{**row.to_dict(), "shape": [1, 2, 3], "unit": "GOPS", "share": 0.5}]


def test_the_table_is_aligned_and_explains_its_limits() -> None:
    rows = [
        Row(case="short", metric="time", unit=Unit.MILLISECONDS, value=1234.5, limit=617.25, limit_is="half of it"),
        Row(case="a longer case", metric="rate", unit=Unit.GOPS, value=1.0, format="nf3", shape=(1, 20, 300)),
    ]
    head, rule, *lines = table(rows).splitlines()
    assert len({len(line) for line in (head, rule, *lines[:2])}) == 1
    assert "1,234 ms" in lines[0]
    assert "1 x 20 x 300" in lines[1]
    assert lines[-1] == "limit of time: half of it"
