"""What this machine can do at best, measured with torch: read memory, multiply matrices.

These are the limits that values are divided by, so each is the fastest of several ways.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle

import torch

from bitdistill_kernels import set_threads as set_kernel_threads
from bitdistill_ray.bench.timing import Function, seconds_per_call, window

POOL_BYTES = 512 * 10**6  # more than caches hold
ROW = 4096  # floats of one row of the buffer that is read
PROBE_TOKENS = 256  # rows of the product that shows how fast matrices are multiplied


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where is measured.  `threads` is None on a GPU; `pool_bytes` is what the matrices of one kind take together."""

    device: torch.device
    threads: int | None
    pool_bytes: int

    @classmethod
    def of(cls, device: torch.device, threads: int) -> Place:
        """The whole process uses `threads` threads from now on; pools are smaller where memory is short."""
        torch.set_num_threads(threads)
        set_kernel_threads(threads)
        gpu = device.type == "cuda"
        free = torch.cuda.mem_get_info(device)[0] if gpu else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
        return cls(device=device, threads=None if gpu else threads, pool_bytes=min(POOL_BYTES, free // 8))


class Reader:
    """Reads the bytes of a pool from one end to the other; `read` is the function to time."""

    def __init__(self, place: Place) -> None:
        rows, device = max(1, place.pool_bytes // (4 * ROW)), place.device
        self.buffer = torch.ones(rows, ROW, device=device)
        flat, ones = self.buffer.flatten(), torch.ones(ROW, device=device)
        ways: dict[str, Function] = {
            "sum": lambda: flat.sum(),
            "dot product": lambda: torch.dot(flat, flat),
            "matrix-vector product": lambda: self.buffer.mv(ones),
        }
        times = {name: min(window(way, 1, device) for _ in range(3)) for name, way in ways.items()}
        self.way = min(times, key=lambda name: times[name])
        self.read = ways[self.way]

    def bandwidth(self, seconds: float) -> float:
        """Bytes per second of a `read` that took so long."""
        return self.buffer.nbytes / seconds

    @property
    def says(self) -> str:
        """What the limit is, in words."""
        return f"memory read by torch ({self.way} over {self.buffer.nbytes / 1e6:.0f} MB)"


def multiply_rate(N: int, K: int, place: Place) -> tuple[float, str]:
    """(operations per second, in words) of the fastest dense [M, K] x [K, N] of torch, whatever its dtype."""
    device = place.device
    x_MK = torch.randn(PROBE_TOKENS, K, device=device)
    # each in the layout that its int8 product wants: cuBLAS a transposed one
    w_KN = torch.randn(N, K, device=device).t() if device.type == "cuda" else torch.randn(K, N)
    ways: dict[str, Function] = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        ways[name] = _product(x_MK.to(dtype), w_KN.to(dtype))
    if hasattr(torch, "_int_mm") and N % 8 == 0 and K % 8 == 0:
        ways["int8"] = _product(x_MK.to(torch.int8), w_KN.to(torch.int8), torch._int_mm)
    times = seconds_per_call(ways, device=device, windows=5)
    best = min(times, key=lambda name: times[name])
    return 2 * PROBE_TOKENS * N * K / times[best], f"the fastest dense product of torch ({best}, {PROBE_TOKENS} tokens)"


def turns(functions: list[Function]) -> Function:
    """A function that calls the next of `functions` each time, round and round."""
    order = cycle(functions)
    return lambda: next(order)()


def _product(
    x: torch.Tensor, w: torch.Tensor, multiply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = torch.mm
) -> Function:
    return lambda: multiply(x, w)
