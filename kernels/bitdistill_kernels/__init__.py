"""Low-bit CPU kernels: y = x Wᵀ + bias with W in 2, 3, 4 or 8 bits, in C++ behind a C ABI, called through ctypes.

Takes numpy arrays and torch CPU tensors and returns the same kind, without importing torch.  A weight is given once as
the canonical bytes of `docs/FORMAT.md`, is repacked for vector units, and is then multiplied as often as needed:

    weight = Weight.create(codes, scales, zeros, format="int2", granularity="group", group_size=128, shape=(N, K))
    y_MN = weight.matmul(x_MK, bias=bias_N, activation_bits=8)
    x_MK = weight.rows(ids_M)

    M rows of x, tokens   N out features   K in features   G groups of a row
"""

from bitdistill_kernels.activation import quantize_activation
from bitdistill_kernels.library import instruction_sets, set_instruction_set, set_threads, threads
from bitdistill_kernels.limits import multiply_add, read_memory, read_ways
from bitdistill_kernels.weight import Weight, matmul, matmul_shared

__all__ = [
    "Weight",
    "instruction_sets",
    "matmul",
    "matmul_shared",
    "multiply_add",
    "quantize_activation",
    "read_memory",
    "read_ways",
    "set_instruction_set",
    "set_threads",
    "threads",
]
