#include "lanes_neon.inl"
#include "vector_ops.inl"

namespace bdk {

const VectorOps kNeonOps = {rms_norm, add_to, apply_gate, rotate, soft_cap, widen, dense_rows, append, attend};

}  // namespace bdk
