"""Addresses of numpy arrays and torch CPU tensors, without importing torch."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, TypeVar

import numpy as np

from bitdistill_ray.errors import KernelError

Array = Any
"""A numpy array or a torch tensor on the CPU."""
ArrayT = TypeVar("ArrayT")


class Buffer(NamedTuple):
    """Contiguous memory; `owner` keeps it alive, and must be held as long as the address is used."""

    address: int
    nbytes: int
    dtype: str  # "uint8", "float16", "float32"
    shape: tuple[int, ...]
    owner: Array


def buffer(array: Array, what: str, dtypes: tuple[str, ...]) -> Buffer:
    """The contiguous memory of `array`, copied where it is not contiguous.

    Raises KernelError where `array` is neither a numpy array nor a torch CPU tensor, or is not one of `dtypes`.
    """
    if isinstance(array, np.ndarray):
        owner = np.ascontiguousarray(array)
        found = Buffer(owner.ctypes.data, owner.nbytes, owner.dtype.name, array.shape, owner)
    elif hasattr(array, "data_ptr"):
        if not array.is_cpu:
            raise KernelError(what, f"a tensor on {array.device}", "Move it to the CPU")
        owner = array if array.is_contiguous() else array.detach().contiguous()
        found = Buffer(owner.data_ptr(), owner.nbytes, _name(owner.dtype), tuple(owner.shape), owner)
    else:
        raise KernelError(what, f"a {type(array).__name__}", "Give a numpy array or a torch CPU tensor")
    if found.dtype not in dtypes:
        raise KernelError(what, f"of dtype {found.dtype}", f"Give {' or '.join(dtypes)}")
    return found


@functools.cache
def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def empty_like(array: ArrayT, shape: tuple[int, ...], dtype: str) -> ArrayT:
    """An uninitialised array of the kind of `array` (numpy or torch)."""
    made: Any = array
    if isinstance(array, np.ndarray):
        made = np.empty(shape, dtype=dtype)
    else:
        made = made.new_empty(shape, dtype=getattr(__import__("torch"), dtype))
    return made  # type: ignore[no-any-return]


def address_of(array: Array) -> int:
    """Where its first element lies."""
    return int(array.data_ptr() if hasattr(array, "data_ptr") else array.ctypes.data)
