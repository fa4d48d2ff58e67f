#pragma once

#include <cstdint>

#include "weight.h"

namespace bdk {

// Arguments as bdk_matmul's, checked.
int multiply_fp32(const bdk_weight& weight, const float* x, std::int64_t tokens, const float* bias, float* y);
int multiply_int8(const bdk_weight& weight, const float* x, std::int64_t tokens, const float* bias, float* y);

}  // namespace bdk
