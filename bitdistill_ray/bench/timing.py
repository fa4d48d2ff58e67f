"""Seconds of a call: medians over windows, in which everything that is to be compared takes turns.

A shared or throttled machine changes its speed from second to second.  Functions whose times will be divided by each
other therefore run window by window in turn, never one after the other: what slows one slows all.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from statistics import median

import torch

WINDOWS = 7
WINDOW_S = 0.05
MOST_CALLS = 1000  # of one window

Function = Callable[[], object]


def seconds_per_call(
    functions: Mapping[str, Function],
    *,
    device: torch.device | str = "cpu",
    windows: int = WINDOWS,
    least_calls: int = 1,
) -> dict[str, float]:
    """Median seconds of one call of each function, over at least 5 windows of about `WINDOW_S` after a warm-up.

    `least_calls` of a window follow each other without a wait for the device: for what a GPU is given ahead of time.
    """
    if windows < 5:
        raise ValueError(f"{windows} windows are too few for a median")
    calls = {name: max(least_calls, _calls(function, device)) for name, function in functions.items()}
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(windows):
        for name, function in functions.items():
            times[name].append(window(function, calls[name], device))
    return {name: median(of) for name, of in times.items()}


def window(function: Function, calls: int, device: torch.device | str = "cpu") -> float:
    """Seconds of one call, averaged over `calls` in a row."""
    synchronize(device)
    began = time.perf_counter()
    for _ in range(calls):
        function()
    synchronize(device)
    return (time.perf_counter() - began) / calls


def synchronize(device: torch.device | str) -> None:
    """Wait until a GPU has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def _calls(function: Function, device: torch.device | str) -> int:
    """Warm up, and find how many calls fill a window."""
    window(function, 1, device)
    return max(1, min(MOST_CALLS, math.ceil(WINDOW_S / max(window(function, 2, device), 1e-9))))
