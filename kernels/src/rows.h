// Single rows of a weight in fp32, as an embedding needs them.
#pragma once

#include <cstdint>

#include "weight.h"

namespace bdk {

// out [count, columns]; ids are within the rows.
void dequantize_rows(const bdk_weight& weight, const std::int64_t* ids, std::int64_t count, float* out);

}  // namespace bdk
