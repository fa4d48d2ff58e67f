"""`bitdistill bench serve`: its client against a server in this process, and all of it against `bitdistill serve`."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from bitdistill_ray.bench import main
from bitdistill_ray.bench.http_load import ask, crowd
from tests.bench.test_report import KEYS
from tests.serve.in_process import GREEDY, live
from tests.serve.references import greedy_text, prompt_ids
from tests.tiny_models import save_tiny

BODY = GREEDY | {"prompt": "The quick", "ignore_eos": True}


def test_a_reply_is_the_whole_text_and_its_moments() -> None:
    with live(slots=2, queue=0) as url:
        reply = asyncio.run(ask(url, BODY))
        assert (reply.status, reply.whole, reply.tokens) == (200, True, 8)
        assert reply.text == greedy_text(prompt_ids("The quick"), 8)
        assert reply.began_s < reply.chunks_s[0] <= reply.chunks_s[-1] <= reply.ended_s
        assert len(reply.gaps_s) == len(reply.chunks_s) - 1

        left = asyncio.run(ask(url, BODY | {"max_tokens": 100}, hang_up_after=1))
        assert (left.cancelled, left.whole, len(left.chunks_s)) == (True, False, 1)

        replies = asyncio.run(crowd(6, 0.5, lambda: ask(url, BODY | {"max_tokens": 60})))
        assert {reply.status for reply in replies} == {200, 429}
        assert all(reply.retry_after_s >= 1 for reply in replies if reply.status == 429)
    gone = asyncio.run(ask(url, BODY))
    assert (gone.status, gone.whole) == (0, False)


def test_text_goes_on_after_a_stop_token_when_asked() -> None:
    with live() as url:
        biased = BODY | {"logit_bias": {"0": 100}, "max_tokens": 3}  # the stop token, every time
        assert asyncio.run(ask(url, biased)).tokens == 3
        assert asyncio.run(ask(url, biased | {"ignore_eos": False})).tokens == 1


def measured(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    model, file = save_tiny(folder / "tiny"), folder / "serve.json"
    small = ["--streams", "2", "--queue", "2", "--prompt-tokens", "8", "--new-tokens", "64", "--threads", "1"]
    assert main(["serve", str(model), *small, "--json", str(file), *arguments]) == 0
    rows: list[dict[str, Any]] = json.loads(file.read_text())["rows"]
    assert all(set(row) == KEYS for row in rows)
    return rows


@pytest.mark.slow
def test_every_part_but_the_soak(tmp_path: Path) -> None:
    rows = {
        (row["case"], row["metric"]): row
        for row in measured(tmp_path, "--only", "stream,overload", "--overload-s", "2")
    }
    overloads = "overload, 4 times the rate of the peak", "overload, 16 clients for 4 places"
    assert list(rows) == [
        ("replica", "model loaded"),
        ("one stream", "tokens/s"), ("one stream", "time to first token"),
        ("2 streams", "tokens/s"), ("2 streams", "p99 time per token"),
        *((overload, metric) for overload in overloads
          for metric in ("goodput", "refused", "p99 time to a 429", "errors", "memory grown",
                         "first answer afterwards")),
    ]  # fmt: skip
    for overload in overloads:
        assert rows[overload, "errors"]["value"] == 0
        assert rows[overload, "refused"]["value"] > 0
        assert rows[overload, "goodput"]["limit"] == rows["2 streams", "tokens/s"]["value"]


@pytest.mark.soak
def test_the_soak(tmp_path: Path) -> None:
    rows = {row["metric"]: row["value"] for row in measured(tmp_path, "--only", "soak", "--soak-s", "40")}
    assert rows["wrong answers"] == rows["leaked slots"] == 0
    assert rows["answers compared"] > 100
