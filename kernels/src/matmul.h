// Products of one input with one weight or several.
#pragma once

#include <cstdint>

#include "bitdistill_kernels.h"
#include "weight.h"

namespace bdk {

// What activations become before they meet a weight.
enum class Activation {
  kFloat,         // nothing
  kInt8PerToken,  // int8 with a scale for each token
  kInt8PerGroup,  // int8 with a scale for each group of the weight
};

// All products of x [tokens, columns].  The input is staged once for all weights with groups alike that stand beside
// each other, and such weights are multiplied in one round of the pool.  A status of enum bdk_status.
int multiply(const bdk_product* products, std::int64_t count, const float* x, std::int64_t tokens,
             Activation activation);

}  // namespace bdk
