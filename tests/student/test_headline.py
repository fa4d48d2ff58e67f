"""The line that people watch: what it says, over which rows it averages, where it goes."""

from __future__ import annotations

import io
from typing import Any

import pytest
import ray

from bitdistill_ray.storage import Storage
from bitdistill_ray.student.display import BarScreen, ProgressBar
from bitdistill_ray.student.flops import Arithmetic, flops_per_token, peak_bf16
from bitdistill_ray.student.headline import MIN_ROWS, Window, headline, loss_parts
from bitdistill_ray.student.monitor import Monitor


def row(step: int, **more: Any) -> dict[str, Any]:
    base = {"step": step, "loss": 1.23456, "ce": 0.9, "learning_rate": 1e-4, "grad_norm": 0.5, "tokens": 1000,
            "seconds": 1.5, "data_wait_s": 0.5, "teacher_wait_s": 0.3, "teacher_bytes": 400_000_000}  # fmt: skip
    return {**base, **more}


def window_of(*rows: dict[str, Any], **options: Any) -> Window:
    window = Window(**options)
    for one in rows:
        window.add(one)
    return window


def test_the_line_says_everything_that_is_known() -> None:
    newest = row(11, relation=0.33456, mfu=0.5)
    pace = window_of(newest, workers=2).pace()
    assert pace is not None
    assert headline(newest, pace, steps=500) == (
        "12/500  loss 1.2346 (ce 0.9000, relation 0.3346)  500 tok/s  MFU 37.5 %  wait teacher 15 % data 25 %"
        "  wire 0.40 GB/s  ETA 0:16:16"
    )


def test_what_is_not_known_is_left_out() -> None:
    newest = row(0, mfu=None, teacher_bytes=0, teacher_wait_s=0.0)
    pace = window_of(newest).pace()
    assert pace is not None
    line = headline(newest, pace, steps=2)
    assert line == "1/2  loss 1.2346  500 tok/s  wait teacher 0 % data 25 %  ETA 0:00:02"


def test_parts_are_the_loss_terms_and_nothing_else() -> None:
    parts = loss_parts(
        {"loss": 3.0, "forward_kl@5": 1.0, "cakld": 2.0, "relation": 0.1, "tokens": 4, "grad_norm_ce": 1}
    )
    assert parts == {"forward_kl@5": 1.0, "cakld": 2.0, "relation": 0.1}


def test_the_window_forgets_old_rows_but_keeps_some() -> None:
    slow = [row(i, seconds=100.0) for i in range(10)]
    assert [r["step"] for r in window_of(*slow, span_s=30).rows] == list(range(10 - MIN_ROWS, 10))
    quick = [row(i, seconds=1.0, data_wait_s=0.0) for i in range(100)]
    assert [r["step"] for r in window_of(*quick, span_s=30).rows] == list(range(70, 100))


def test_a_restart_replaces_the_rows_that_it_repeats() -> None:
    window = window_of(*(row(i) for i in range(5)), row(2, tokens=5000))
    assert [r["step"] for r in window.rows] == [0, 1, 2]
    pace = window.pace()
    assert pace is not None
    assert pace.tokens_per_s == pytest.approx(7000 / 6)


def test_a_token_costs_what_palm_says_and_devices_are_known_by_name() -> None:
    cost = flops_per_token(parameters=1000, layers=2, heads=4, head_size=8, length=16)
    assert cost == 6 * 1000 + 12 * 2 * 4 * 8 * 16
    assert peak_bf16("NVIDIA H100 80GB HBM3") == peak_bf16("NVIDIA H200") == 989e12
    assert peak_bf16("NVIDIA H100 PCIe") == 756e12
    assert peak_bf16("NVIDIA L40S") == 362e12
    assert peak_bf16("Intel Xeon") is None
    assert Arithmetic(token_flops=6e9, peak=2 * 989e12).mfu(100_000) == pytest.approx(6e14 / (2 * 989e12))
    assert Arithmetic(token_flops=6e9, peak=None).mfu(100_000) is None


def test_a_terminal_gets_a_bar() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    screen = BarScreen(10, "distill", out)
    screen.row(row(4), window_of(row(4)))
    screen.close()
    assert "[distill] 5/10" in out.getvalue()
    assert "loss 1.2346  500 tok/s" in out.getvalue()


@pytest.mark.slow
def test_a_pipe_gets_lines_with_what_was_said_first(
    tmp_path: Any, capsys: pytest.CaptureFixture[str], ray_session: None
) -> None:
    monitor = ray.remote(Monitor).options(num_cpus=0).remote(Storage(tmp_path), "distill")  # type: ignore[attr-defined]
    ray.get([monitor.say.remote("hello"), *(monitor.step.remote(row(i)) for i in range(3))])
    with ProgressBar(monitor, 10, "distill", every_s=60.0, stream=io.StringIO()):
        pass
    ray.kill(monitor)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "[distill] hello"
    assert lines[1].startswith("[distill] 3/10  loss 1.2346")
    assert len(lines) == 2
