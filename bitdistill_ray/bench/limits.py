"""What this machine can do at best: read memory, multiply matrices.

These are the limits that values are divided by, so each is the fastest of several ways.  On the CPU the kernels' own
loops read, from huge pages as their weights lie on, and multiply int8 on registers alone; elsewhere torch does.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import cycle

import numpy as np
import torch

from bitdistill_kernels import instruction_sets, multiply_add, read_memory, read_ways
from bitdistill_kernels import set_threads as set_kernel_threads
from bitdistill_ray.bench.timing import Function, seconds_per_call, window

POOL_BYTES = 512 * 10**6  # more than caches hold
ROW = 4096  # floats of one row of the buffer that is read
PEAK_OPERATIONS = 10**9  # of one thread: a few milliseconds
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
    """Reads the bytes of a pool from one end to the other, in several ways: `ways` are the functions to time."""

    def __init__(self, place: Place) -> None:
        self.ways, self.nbytes = _kernel_reads(place) if place.device.type == "cpu" else _torch_reads(place)
        times = {name: min(window(way, 1, place.device) for _ in range(3)) for name, way in self.ways.items()}
        self.way = min(times, key=lambda name: times[name])
        self.read = self.ways[self.way]

    def bandwidth(self, seconds: float) -> float:
        """Bytes per second of a `read` that took so long."""
        return self.nbytes / seconds

    def best(self, times: Mapping[str, float]) -> float:
        """Bytes per second of the fastest way, given the seconds of each."""
        return self.bandwidth(min(times[name] for name in self.ways))

    @property
    def says(self) -> str:
        """What the limit is, in words."""
        return f"memory read ({self.nbytes / 1e6:.0f} MB, the fastest of: {', '.join(self.ways)})"


def _kernel_reads(place: Place) -> tuple[dict[str, Function], int]:
    nbytes = max(mmap.PAGESIZE, place.pool_bytes // mmap.PAGESIZE * mmap.PAGESIZE)
    mapped = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared ones get no huge pages
    if hasattr(mmap, "MADV_HUGEPAGE"):
        mapped.madvise(mmap.MADV_HUGEPAGE)
    memory = np.frombuffer(mapped, dtype=np.uint8)
    memory[:] = 1
    names = ("one stream", "one stream, asking ahead", "four streams")[: read_ways()]
    return {f"read by {name}": partial(read_memory, memory, way) for way, name in enumerate(names)}, nbytes


def _torch_reads(place: Place) -> tuple[dict[str, Function], int]:
    rows, device = max(1, place.pool_bytes // (4 * ROW)), place.device
    buffer = torch.ones(rows, ROW, device=device)
    flat, ones = buffer.flatten(), torch.ones(ROW, device=device)
    ways: dict[str, Function] = {
        "sum": lambda: flat.sum(),
        "dot product": lambda: torch.dot(flat, flat),
        "matrix-vector product": lambda: buffer.mv(ones),
    }
    return ways, buffer.nbytes


class Int8Peak:
    """int8 multiplications and additions on registers alone: `work` is the function to time."""

    def __init__(self, threads: int) -> None:
        self.operations = multiply_add(PEAK_OPERATIONS * threads)
        self.work: Function = lambda: multiply_add(PEAK_OPERATIONS * threads)

    def rate(self, seconds: float) -> float:
        """Operations per second of a `work` that took so long."""
        return self.operations / seconds

    @property
    def says(self) -> str:
        """What the limit is, in words."""
        return f"int8 dot products on registers ({instruction_sets()['chosen']})"


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
