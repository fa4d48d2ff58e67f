// One linear layer of the description: an optional norm, a packed or dense product, an optional bias.
#pragma once

#include <cstdint>

#include "bitdistill_decoder.h"

namespace bdk {

// False where it is not a [rows, columns] layer that can be computed.
bool linear_fits(const bdk_linear& linear, std::int64_t rows, std::int64_t columns);

// y [tokens, rows] of x [tokens, columns]; `normed` has room for x.  A status of enum bdk_status.
int apply_linear(const bdk_linear& linear, const float* x, std::int64_t tokens, float* normed, float* y);

// out = gain * x / rms(x), token by token; shared among the threads.
void norm_tokens(const float* x, std::int64_t tokens, std::int64_t size, const float* gain, float eps, float* out);

}  // namespace bdk
