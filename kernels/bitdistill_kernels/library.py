"""The compiled library: where it is, its C functions, and the settings of the process.

The library is loaded at the first call and not at import, so that `python -m bitdistill_kernels.build` can run in a
checkout that has none yet.  ctypes calls a function in about a microsecond and releases the GIL meanwhile.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from pathlib import Path
from typing import TypedDict

from bitdistill_ray.errors import KernelError

ABI_VERSION = 2
MAX_COLUMNS = 65536  # of one matrix: BDK_MAX_COLUMNS
LIBRARY_NAME = "libbitdistill_kernels" + (".dylib" if sys.platform == "darwin" else ".so")

Pointer = ctypes.c_void_p


class WeightDescription(ctypes.Structure):
    """`bdk_weight_description` of include/bitdistill_kernels.h."""

    _fields_ = (
        ("format", ctypes.c_int32),
        ("granularity", ctypes.c_int32),
        ("scale_type", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("group_size", ctypes.c_int64),
        ("codes", Pointer),
        ("codes_bytes", ctypes.c_int64),
        ("scales", Pointer),
        ("scales_bytes", ctypes.c_int64),
        ("zeros", Pointer),
        ("zeros_bytes", ctypes.c_int64),
    )


class Product(ctypes.Structure):
    """`bdk_product`."""

    _fields_ = (("weight", Pointer), ("bias", Pointer), ("y", Pointer))


_INT, _I32, _I64 = ctypes.c_int, ctypes.c_int32, ctypes.c_int64
_FUNCTIONS: dict[str, tuple[object, tuple[object, ...]]] = {
    "bdk_abi_version": (_INT, ()),
    "bdk_status_text": (ctypes.c_char_p, (_INT,)),
    "bdk_weight_create": (_INT, (ctypes.POINTER(WeightDescription), ctypes.POINTER(Pointer))),
    "bdk_weight_free": (None, (Pointer,)),
    "bdk_weight_bytes": (_I64, (Pointer,)),
    "bdk_weight_rows": (_INT, (Pointer, Pointer, _I64, Pointer)),
    "bdk_matmul": (_INT, (Pointer, Pointer, _I64, Pointer, _I32, _I64, Pointer)),
    "bdk_matmul_shared": (_INT, (ctypes.POINTER(Product), _I64, Pointer, _I64, _I32, _I64)),
    "bdk_quantize_activation": (_INT, (Pointer, _I64, _I64, _I64, Pointer, Pointer)),
    "bdk_instruction_set_count": (_INT, ()),
    "bdk_instruction_set_name": (ctypes.c_char_p, (_INT,)),
    "bdk_instruction_set_available": (_INT, (_INT,)),
    "bdk_instruction_set_chosen": (_INT, ()),
    "bdk_instruction_set_choose": (_INT, (_INT,)),
    "bdk_threads": (_INT, ()),
    "bdk_set_threads": (_INT, (_INT,)),
    "bdk_decoder_create": (_INT, (Pointer, _I64, _I64, _I32, ctypes.POINTER(Pointer))),
    "bdk_decoder_free": (None, (Pointer,)),
    "bdk_decoder_cache_bytes": (_I64, (Pointer,)),
    "bdk_decoder_scratch_bytes": (_I64, (Pointer,)),
    "bdk_decoder_copy": (_INT, (Pointer, _I64, _I64, _I64)),
    "bdk_decoder_forward": (_INT, (Pointer, _I64, Pointer, Pointer, Pointer, Pointer, Pointer, Pointer)),
    "bdk_read_ways": (_INT, ()),
    "bdk_read": (ctypes.c_uint64, (Pointer, _I64, _INT)),
    "bdk_multiply_add": (_I64, (_I64,)),
}


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library, its functions typed.

    Raises KernelError where it has not been built, cannot be loaded here, or belongs to another version.
    """
    path = _find()
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelError(str(path), f"cannot be loaded ({error})", _BUILD) from error
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(loaded, name, None)
        if function is None:
            raise KernelError(str(path), f"lacks {name}", _BUILD)
        function.restype, function.argtypes = result, arguments
    if loaded.bdk_abi_version() != ABI_VERSION:
        raise KernelError(str(path), f"has ABI {loaded.bdk_abi_version()}, this package needs {ABI_VERSION}", _BUILD)
    return loaded


def check(status: int, where: str, what: str, remedy: str) -> None:
    """Raise KernelError with the library's own words unless `status` is 0."""
    if status:
        text = library().bdk_status_text(status).decode()
        raise KernelError(where, f"{text} ({what})", remedy)


class InstructionSets(TypedDict):
    """Names, best first."""

    available: list[str]
    chosen: str
    built: list[str]


def instruction_sets() -> InstructionSets:
    """What this machine can run, what is in use, and what this build holds."""
    lib = library()
    names = [lib.bdk_instruction_set_name(i).decode() for i in range(lib.bdk_instruction_set_count())]
    available = [name for i, name in enumerate(names) if lib.bdk_instruction_set_available(i)]
    return {"available": available, "chosen": names[lib.bdk_instruction_set_chosen()], "built": names}


def set_instruction_set(name: str) -> None:
    """Use this instruction set in the whole process from the next product on.

    Raises KernelError where the machine or the build does not have it.
    """
    lib = library()
    for index in range(lib.bdk_instruction_set_count()):
        if lib.bdk_instruction_set_name(index).decode() == name and not lib.bdk_instruction_set_choose(index):
            return
    raise KernelError("instruction set", f"{name!r} cannot run here", f"Use one of {instruction_sets()['available']}")


def threads() -> int:
    """Threads that share one product; at first, the processors that this process may use."""
    return int(library().bdk_threads())


def set_threads(count: int) -> None:
    """Share each product among `count` threads, the caller included.  Results do not depend on it.

    Raises KernelError where the count is not in 1..1024 or the threads cannot be started.
    """
    if not 1 <= count <= 1024 or library().bdk_set_threads(count):
        raise KernelError("threads", f"{count} threads cannot be started", "Use 1 up to the number of processors")


_BUILD = "Run `python -m bitdistill_kernels.build`, or install the wheel"


def _find() -> Path:
    # an editable install has the sources in one folder of __path__ and the library in another
    import bitdistill_kernels

    folders = [Path(folder) for folder in bitdistill_kernels.__path__]
    for folder in folders:
        if (folder / LIBRARY_NAME).is_file():
            return folder / LIBRARY_NAME
    raise KernelError("bitdistill_kernels", f"{LIBRARY_NAME} is not in {folders[0]}", _BUILD)
