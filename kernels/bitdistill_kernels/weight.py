"""A packed weight in the kernels' own layout, and its product with activations."""

from __future__ import annotations

import ctypes
import math
import weakref
from enum import IntEnum

from bitdistill_kernels.buffers import Array, ArrayT, buffer, empty_like
from bitdistill_kernels.library import Pointer, WeightDescription, check, library
from bitdistill_ray.errors import KernelError


class _Format(IntEnum):  # enum bdk_format
    TERNARY = 0
    INT2 = 1
    INT3 = 2
    NF3 = 3
    SEQ2 = 4
    SEQ_TERNARY = 5
    LSQ3 = 6


class _Granularity(IntEnum):  # enum bdk_granularity
    TENSOR = 0
    ROW = 1
    GROUP = 2


_SCALE_TYPES = {"float16": 0, "float32": 1}  # enum bdk_scale_type
_MAX_COLUMNS = 65536
_REMEDY = (
    "Give the canonical bytes of docs/FORMAT.md: codes [N, row bytes] uint8; scales float16 or float32 [1], [N, 1] or "
    f"[N, G] (nf3: [N, G, 2]); zeros for int2 and int3 only; at most {_MAX_COLUMNS} in features"
)


class Weight:
    """An [N, K] matrix ready to be multiplied.  Immutable; may be used from several threads at once."""

    def __init__(self, handle: int, shape: tuple[int, int]) -> None:
        """Takes over a handle of `bdk_weight_create`; use `Weight.create`."""
        self.shape = shape
        self._handle = handle
        weakref.finalize(self, library().bdk_weight_free, handle)

    @classmethod
    def create(
        cls,
        codes: Array,
        scales: Array,
        zeros: Array | None = None,
        *,
        format: str,
        shape: tuple[int, int],
        granularity: str = "group",
        group_size: int | None = None,
    ) -> Weight:
        """Copy and repack canonical bytes.

        codes   uint8 [N, row bytes]
        scales  float16 or float32; [1] per "tensor", [N, 1] per "row", [N, G] per "group"; nf3 [N, G, 2]
        zeros   uint8 [N, bytes of G codes] for int2 and int3 (one row of them per tensor), else None
        format  "ternary", "int2", "int3", "nf3", "seq2", "seq-ternary" or "lsq3"

        Raises KernelError where a name, dtype or size does not fit, or a ternary code is 3.
        """
        description = WeightDescription(
            format=_member(_Format, "format", format),
            granularity=_member(_Granularity, "granularity", granularity),
            rows=shape[0],
            columns=shape[1],
        )
        if description.granularity == _Granularity.GROUP:
            if group_size is None:
                raise KernelError("group_size", "None with a scale for each group", "Give the number of inputs")
            description.group_size = group_size
        kept = {"codes": buffer(codes, "codes", ("uint8",)), "scales": buffer(scales, "scales", tuple(_SCALE_TYPES))}
        description.scale_type = _SCALE_TYPES[kept["scales"].dtype]
        if zeros is not None:
            kept["zeros"] = buffer(zeros, "zeros", ("uint8",))
        for name, memory in kept.items():
            setattr(description, name, memory.address)
            setattr(description, f"{name}_bytes", memory.nbytes)
        handle = Pointer()
        status = library().bdk_weight_create(ctypes.byref(description), ctypes.byref(handle))
        sizes = ", ".join(f"{name} {list(memory.shape)} {memory.dtype}" for name, memory in kept.items())
        check(status, f"{format} weight {list(shape)} per {granularity} {group_size or ''}".rstrip(), sizes, _REMEDY)
        if handle.value is None:
            raise KernelError("weight", "not created", _REMEDY)
        return cls(handle.value, shape)

    def __copy__(self) -> Weight:
        return self

    def __deepcopy__(self, memo: object) -> Weight:
        return self

    def __reduce__(self) -> str:
        raise KernelError("weight", "holds memory of this process", "Send the packed bytes and create it again there")

    @property
    def handle(self) -> int:
        """The library's pointer, valid while this object lives."""
        return self._handle

    @property
    def nbytes(self) -> int:
        """Bytes of the repacked weight: a little more than the canonical ones, because tiles are padded."""
        return int(library().bdk_weight_bytes(self._handle))

    def matmul(
        self,
        x: ArrayT,
        *,
        bias: Array | None = None,
        activation_bits: int | None = None,
        out: ArrayT | None = None,
    ) -> ArrayT:
        """x Wᵀ + bias: float32 [..., K] to float32 [..., N], numpy to numpy and torch to torch.

        activation_bits None multiplies in fp32.  8 quantises each token to int8 (`quantize_activation`) and sums each
        group's products exactly; the result is the same bits on every instruction set.  Either way it does not depend
        on the number of threads, nor a token's row on the tokens beside it.  `out` is a contiguous array to write to.
        Raises KernelError where a shape or dtype does not fit.
        """
        N, K = self.shape
        given = buffer(x, "x", ("float32",))
        if not given.shape or given.shape[-1] != K:
            raise KernelError("x", f"of shape {list(given.shape)} for a weight {[N, K]}", f"Give [..., {K}]")
        if activation_bits not in (None, 8):
            raise KernelError("activation_bits", f"{activation_bits}", "Use 8, or None for fp32 activations")
        shape = (*given.shape[:-1], N)
        y = empty_like(x, shape, "float32") if out is None else out
        written = buffer(y, "out", ("float32",))
        if written.shape != shape or written.address != _address(y):
            raise KernelError("out", f"of shape {list(written.shape)} or not contiguous", f"Give {list(shape)}")
        added = None if bias is None else buffer(bias, "bias", ("float32",))
        if added is not None and added.shape != (N,):
            raise KernelError("bias", f"of shape {list(added.shape)}", f"Give [{N}]")
        status = library().bdk_matmul(
            self._handle,
            given.address,
            math.prod(shape[:-1]),
            None if added is None else added.address,
            activation_bits or 0,
            written.address,
        )
        check(status, "matmul", f"x {list(given.shape)}", "Free memory, or give fewer tokens at a time")
        return y


def matmul(
    x: ArrayT,
    codes: Array,
    scales: Array,
    zeros: Array | None = None,
    *,
    format: str,
    granularity: str = "group",
    group_size: int | None = None,
    activation_bits: int | None = None,
    bias: Array | None = None,
) -> ArrayT:
    """`Weight.create` and `Weight.matmul` in one call, for a weight used once; arguments and errors are theirs.

    N is the number of rows of `codes`, K the last dimension of `x`.
    """
    shapes: list[tuple[int, ...]] = [buffer(codes, "codes", ("uint8",)).shape, buffer(x, "x", ("float32",)).shape]
    if any(len(shape) == 0 for shape in shapes):
        raise KernelError("matmul", "a scalar", "Give x [..., K] and codes [N, row bytes]")
    weight = Weight.create(
        codes,
        scales,
        zeros,
        format=format,
        shape=(shapes[0][0], shapes[1][-1]),
        granularity=granularity,
        group_size=group_size,
    )
    return weight.matmul(x, bias=bias, activation_bits=activation_bits)


def quantize_activation(x: ArrayT) -> tuple[ArrayT, ArrayT]:
    """The int8 activations of `matmul(activation_bits=8)`: float32 [..., K] to int8 [..., K] and float32 [..., 1].

        peak = max(max|x|, 1e-5)    q = clamp(round half even(x * (127 / peak)), -128, 127)    scale = peak / 127

    in float32: the integers of `bitdistill_ray.quant.quantize_activation`.  A token with a NaN or an infinity gets the
    scale NaN.  Raises KernelError for another dtype or K out of range.
    """
    given = buffer(x, "x", ("float32",))
    if not given.shape:
        raise KernelError("x", "a scalar", "Give [..., K]")
    q = empty_like(x, given.shape, "int8")
    scale = empty_like(x, (*given.shape[:-1], 1), "float32")
    status = library().bdk_quantize_activation(
        given.address, math.prod(given.shape[:-1]), given.shape[-1], _address(q), _address(scale)
    )
    check(status, "x", f"shape {list(given.shape)}", f"Give [..., K] with K in 1..{_MAX_COLUMNS}")
    return q, scale


def _address(array: Array) -> int:
    return int(array.data_ptr() if hasattr(array, "data_ptr") else array.ctypes.data)


def _member(names: type[IntEnum], what: str, name: str) -> int:
    key = name.upper().replace("-", "_")
    if key not in names.__members__:
        supported = ", ".join(member.lower().replace("_", "-") for member in names.__members__)
        raise KernelError(what, f"{name!r} is not supported by the kernels", f"Use one of {supported}")
    return int(names[key])
