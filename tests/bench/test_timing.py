"""Windows in turns, and memory that is counted while it lives."""

from __future__ import annotations

from itertools import groupby

import pytest
import torch
from torch import Tensor, nn

from bitdistill_ray.bench import timing
from bitdistill_ray.bench.limits import turns
from bitdistill_ray.bench.memory import LiveBytes, peak_bytes
from bitdistill_ray.bench.timing import seconds_per_call

CPU = torch.device("cpu")


def test_functions_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "WINDOW_S", 1e-4)
    called: list[str] = []
    times = seconds_per_call({name: lambda name=name: called.append(name) for name in "ab"}, windows=6)  # type: ignore[misc]
    windows = [name for name, _ in groupby(called)]
    assert windows == ["a", "b"] * 7  # the warm-up, and six windows
    assert all(seconds > 0 for seconds in times.values())


def test_a_median_needs_five_windows() -> None:
    with pytest.raises(ValueError, match="too few"):
        seconds_per_call({"a": lambda: None}, windows=4)


def test_a_pool_goes_round() -> None:
    called: list[int] = []
    function = turns([lambda i=i: called.append(i) for i in range(3)])  # type: ignore[misc]
    for _ in range(7):
        function()
    assert called == [0, 1, 2, 0, 1, 2, 0]


def test_peak_counts_what_lives_at_the_same_time() -> None:
    before = torch.zeros(1000)

    def work() -> None:
        a = before + 1  # 4000 bytes
        b = a.view(10, 100) * 2  # 4000 more; the view is a's memory
        del a
        b.add_(before.view(10, 100))  # in place
        (b.double() + 1).sum()  # b, its double and the sum of it and 1 at the same time: 4000 + 8000 + 8000

    assert peak_bytes(work, CPU) == 20000


def test_backward_passes_count() -> None:
    """x W, its square and the sum: in the backward pass the gradients of both and of W come beside what was saved."""
    linear, x = nn.Linear(64, 512, bias=False), torch.randn(32, 64)

    def loss() -> Tensor:
        return linear(x).square().sum()

    forward = peak_bytes(loss, CPU)
    assert forward >= 2 * 32 * 512 * 4
    assert peak_bytes(lambda: loss().backward(), CPU) >= forward + linear.weight.nbytes  # type: ignore[no-untyped-call]


def test_nothing_stays_alive() -> None:
    with LiveBytes() as mode:
        (torch.ones(100) + 1).sum()
    assert mode.live == 0
    assert mode.peak > 0
