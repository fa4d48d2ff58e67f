#include "linear.h"

#include "matmul.h"
#include "thread_pool.h"
#include "vector_ops.h"
#include "weight.h"

namespace bdk {

bool linear_fits(const bdk_linear& linear, std::int64_t rows, std::int64_t columns) {
  if (linear.rows != rows || linear.columns != columns) return false;
  if (linear.packed == nullptr)
    return linear.dense != nullptr && linear.value_type >= BDK_VALUE_FP32 && linear.value_type <= BDK_VALUE_BF16;
  if (linear.activation_bits != 0 && linear.activation_bits != 8) return false;
  return linear.packed->rows == rows && linear.packed->layout.columns == columns;
}

void norm_tokens(const float* x, std::int64_t tokens, std::int64_t size, const float* gain, float eps, float* out) {
  const VectorOps& ops = vector_ops();
  parallel(tokens, tokens * size, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t token = begin; token < end; ++token)
      ops.rms_norm(x + token * size, gain, size, eps, out + token * size);
  });
}

int apply_linear(const bdk_linear& linear, const float* x, std::int64_t tokens, float* normed, float* y) {
  if (linear.norm_gain != nullptr) {
    norm_tokens(x, tokens, linear.columns, linear.norm_gain, linear.norm_eps, normed);
    x = normed;
  }
  if (linear.packed != nullptr) {
    const auto multiply = linear.activation_bits == 8 ? multiply_int8 : multiply_fp32;
    return multiply(*linear.packed, x, tokens, linear.bias, y);
  }
  const DenseMatrix matrix = {linear.dense, static_cast<bdk_value_type>(linear.value_type), linear.rows,
                              linear.columns};
  const VectorOps& ops = vector_ops();
  parallel(linear.rows, linear.rows * linear.columns * tokens, [&](std::int64_t begin, std::int64_t end) {
    ops.dense_rows(matrix, x, tokens, linear.bias, begin, end, y);
  });
  return BDK_OK;
}

}  // namespace bdk
