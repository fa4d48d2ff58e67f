#include "lanes_avx2.inl"
#include "vector_ops.inl"

namespace bdk {

const VectorOps kAvx2Ops = {rms_norm, add_to, apply_gate, rotate, soft_cap, widen, dense_rows, append, attend};

}  // namespace bdk
