"""A packed weight in the kernels' own layout, and its product with activations."""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Sequence
from enum import IntEnum

from bitdistill_kernels.buffers import Array, ArrayT, address_of, buffer, empty_like
from bitdistill_kernels.library import MAX_COLUMNS, Pointer, Product, WeightDescription, check, library
from bitdistill_ray.errors import KernelError


class _Format(IntEnum):  # enum bdk_format
    TERNARY = 0
    INT2 = 1
    INT3 = 2
    NF3 = 3
    SEQ2 = 4
    SEQ_TERNARY = 5
    LSQ3 = 6
    INT4 = 7
    INT8 = 8


class _Granularity(IntEnum):  # enum bdk_granularity
    TENSOR = 0
    ROW = 1
    GROUP = 2


_SCALE_TYPES = {"float16": 0, "float32": 1}  # enum bdk_scale_type
_REMEDY = (
    "Give the canonical bytes of docs/FORMAT.md: codes [N, row bytes] uint8; scales float16 or float32 [1], [N, 1] or "
    f"[N, G] (nf3: [N, G, 2]); zeros for int2, int3 and int4 only; at most {MAX_COLUMNS} in features"
)


class Weight:
    """An [N, K] matrix ready to be multiplied.  Immutable; may be used from several threads at once."""

    def __init__(self, handle: int, shape: tuple[int, int], group_size: int | None = None) -> None:
        """Takes over a handle of `bdk_weight_create`; use `Weight.create`."""
        self.shape = shape
        self.group_size = group_size
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
        zeros   uint8 [N, bytes of G codes] for int2, int3 and int4 (one row of them per tensor), else None
        format  "ternary", "int2", "int3", "nf3", "seq2", "seq-ternary", "lsq3", "int4" or "int8"

        Raises KernelError where a name, dtype or size does not fit, a ternary code is 3 or an int8 code is 0.
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
        return cls(handle.value, shape, group_size if description.granularity == _Granularity.GROUP else None)

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
        activation_group: int | None = None,
        out: ArrayT | None = None,
    ) -> ArrayT:
        """x Wᵀ + bias: float32 [..., K] to float32 [..., N], numpy to numpy and torch to torch.

        activation_bits None multiplies in fp32.  8 quantises to int8 (`quantize_activation`), each token with one
        scale or, where `activation_group` is the weight's group size, with one for each group; the products of a group
        are summed exactly, and the result is the same bits on every instruction set.  Either way it does not depend
        on the number of threads, nor a token's row on the tokens beside it.  `out` is a contiguous array to write to.
        Raises KernelError where a shape or dtype does not fit.
        """
        outs = None if out is None else [out]
        [y] = matmul_shared(
            [self], x, biases=[bias], activation_bits=activation_bits, activation_group=activation_group, outs=outs
        )
        return y

    def rows(self, ids: ArrayT) -> ArrayT:
        """The rows `ids` int64 [...] of the matrix in float32, [..., K], as an embedding looks them up.

        Raises KernelError where an id is not a row, or ids are not int64.
        """
        N, K = self.shape
        given = buffer(ids, "ids", ("int64",))
        out = empty_like(ids, (*given.shape, K), "float32")
        status = library().bdk_weight_rows(self._handle, given.address, math.prod(given.shape), address_of(out))
        check(status, "rows", f"ids {list(given.shape)}", f"Give ids in 0..{N - 1}")
        return out


def matmul_shared(
    weights: Sequence[Weight],
    x: ArrayT,
    *,
    biases: Sequence[Array | None] | None = None,
    activation_bits: int | None = None,
    activation_group: int | None = None,
    outs: Sequence[ArrayT] | None = None,
) -> list[ArrayT]:
    """`Weight.matmul` of one x with several weights of as many inputs, such as those of q, k and v.

    x is quantised once for weights with groups alike that follow each other, and threads share out their rows together.
    """
    given = buffer(x, "x", ("float32",))
    for weight in weights:
        if not given.shape or given.shape[-1] != weight.shape[1]:
            what = f"of shape {list(given.shape)} for a weight {list(weight.shape)}"
            raise KernelError("x", what, f"Give [..., {weight.shape[1]}]")
        if activation_group not in (None, weight.group_size):
            what = f"{activation_group} for a weight with groups of {weight.group_size}"
            raise KernelError("activation_group", what, "Give the weight's group size, or None")
    if activation_bits not in (None, 8):
        raise KernelError("activation_bits", f"{activation_bits}", "Use 8, or None for fp32 activations")
    if activation_group is not None and activation_bits is None:
        raise KernelError("activation_group", f"{activation_group} with fp32 activations", "Give activation_bits=8")
    shapes = [(*given.shape[:-1], weight.shape[0]) for weight in weights]
    ys = [empty_like(x, shape, "float32") for shape in shapes] if outs is None else list(outs)
    products, kept = (Product * len(weights))(), []
    for product, weight, shape, y, bias in zip(
        products, weights, shapes, ys, biases or [None] * len(weights), strict=True
    ):
        written = buffer(y, "out", ("float32",))
        if written.shape != shape or written.address != address_of(y):
            raise KernelError("out", f"of shape {list(written.shape)} or not contiguous", f"Give {list(shape)}")
        added = None if bias is None else buffer(bias, "bias", ("float32",))
        if added is not None and added.shape != shape[-1:]:
            raise KernelError("bias", f"of shape {list(added.shape)}", f"Give {list(shape[-1:])}")
        product.weight, product.y = weight._handle, written.address
        product.bias = None if added is None else added.address
        kept.append(added)  # its memory may be a copy
    status = library().bdk_matmul_shared(
        products, len(weights), given.address, math.prod(given.shape[:-1]), activation_bits or 0, activation_group or 0
    )
    check(status, "matmul", f"x {list(given.shape)}", "Free memory, or give fewer tokens at a time")
    return ys


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
    activation_group: int | None = None,
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
    return weight.matmul(x, bias=bias, activation_bits=activation_bits, activation_group=activation_group)


def _member(names: type[IntEnum], what: str, name: str) -> int:
    key = name.upper().replace("-", "_")
    if key not in names.__members__:
        supported = ", ".join(member.lower().replace("_", "-") for member in names.__members__)
        raise KernelError(what, f"{name!r} is not supported by the kernels", f"Use one of {supported}")
    return int(names[key])
