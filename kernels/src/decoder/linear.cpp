#include "linear.h"

#include "matmul.h"
#include "thread_pool.h"
#include "vector_ops.h"
#include "weight.h"

namespace bdk {
namespace {

constexpr std::int64_t kMostShared = 8;

Activation activation_of(const bdk_linear& linear) {
  if (linear.activation_bits == 0) return Activation::kFloat;
  return linear.activation_per_group != 0 ? Activation::kInt8PerGroup : Activation::kInt8PerToken;
}

void multiply_dense(const bdk_linear& linear, const float* x, std::int64_t tokens, float* y) {
  const DenseMatrix matrix = {linear.dense, static_cast<bdk_value_type>(linear.value_type), linear.rows,
                              linear.columns};
  const VectorOps& ops = vector_ops();
  parallel(linear.rows, linear.rows * linear.columns * tokens, [&](std::int64_t begin, std::int64_t end) {
    ops.dense_rows(matrix, x, tokens, linear.bias, begin, end, y);
  });
}

// Packed layers of one input, until they are multiplied together.
class Waiting {
 public:
  Waiting(const float* x, std::int64_t tokens) : x_(x), tokens_(tokens) {}

  int add(const bdk_linear& linear, float* y) {
    const Activation activation = activation_of(linear);
    if (count_ == kMostShared || (count_ > 0 && activation != activation_)) {
      const int status = flush();
      if (status != BDK_OK) return status;
    }
    activation_ = activation;
    products_[count_++] = {linear.packed, linear.bias, y};
    return BDK_OK;
  }

  int flush() {
    const std::int64_t count = count_;
    count_ = 0;
    return count == 0 ? BDK_OK : multiply(products_, count, x_, tokens_, activation_);
  }

 private:
  const float* x_;
  std::int64_t tokens_;
  bdk_product products_[kMostShared];
  std::int64_t count_ = 0;
  Activation activation_ = Activation::kFloat;
};

}  // namespace

bool linear_fits(const bdk_linear& linear, std::int64_t rows, std::int64_t columns) {
  if (linear.rows != rows || linear.columns != columns) return false;
  if (linear.packed == nullptr)
    return linear.dense != nullptr && linear.value_type >= BDK_VALUE_FP32 && linear.value_type <= BDK_VALUE_BF16;
  if (linear.activation_bits != 0 && linear.activation_bits != 8) return false;
  if (linear.activation_per_group != 0 && (linear.activation_bits == 0 || linear.packed->group_size == 0)) return false;
  return linear.packed->rows == rows && linear.packed->layout.columns == columns;
}

void norm_tokens(const float* x, std::int64_t tokens, std::int64_t size, const float* gain, float eps, float* out) {
  const VectorOps& ops = vector_ops();
  parallel(tokens, tokens * size, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t token = begin; token < end; ++token)
      ops.rms_norm(x + token * size, gain, size, eps, out + token * size);
  });
}

int apply_linears(std::initializer_list<LinearOutput> outputs, const float* x, std::int64_t tokens, float* normed) {
  Waiting shared(x, tokens);
  for (const auto& [linear, y] : outputs) {
    if (linear.norm_gain == nullptr && linear.packed != nullptr) {
      const int status = shared.add(linear, y);
      if (status != BDK_OK) return status;
      continue;
    }
    const float* input = x;
    if (linear.norm_gain != nullptr) {
      norm_tokens(x, tokens, linear.columns, linear.norm_gain, linear.norm_eps, normed);
      input = normed;
    }
    if (linear.packed == nullptr) {
      multiply_dense(linear, input, tokens, y);
      continue;
    }
    const bdk_product product = {linear.packed, linear.bias, y};
    const int status = multiply(&product, 1, input, tokens, activation_of(linear));
    if (status != BDK_OK) return status;
  }
  return shared.flush();
}

}  // namespace bdk
