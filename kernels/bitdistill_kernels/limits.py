"""What the chosen instruction set can do at best on `threads()` threads: the limits of a product's time."""

from __future__ import annotations

from bitdistill_kernels.buffers import Array, buffer
from bitdistill_kernels.library import library
from bitdistill_ray.errors import KernelError

_ALIGNMENT = 64


def read_ways() -> int:
    """In how many ways `read_memory` can read: the fastest one is the machine's speed."""
    return int(library().bdk_read_ways())


def read_memory(memory: Array, way: int) -> int:
    """Read all of `memory` (uint8, contiguous, a multiple of 4 KiB); returns a number that depends on all of it.

    Raises KernelError where the memory is not aligned to 64 bytes or there is no such way.
    """
    given = buffer(memory, "memory", ("uint8",))
    if given.address % _ALIGNMENT or not 0 <= way < read_ways():
        what = f"{given.nbytes} bytes at {given.address:#x}, way {way}"
        raise KernelError("read_memory", what, f"Align to {_ALIGNMENT} bytes, and give a way below {read_ways()}")
    return int(library().bdk_read(given.address, given.nbytes, way))


def multiply_add(operations: int) -> int:
    """Do at least so many int8 multiplications and additions on registers alone; returns how many."""
    return int(library().bdk_multiply_add(operations))
