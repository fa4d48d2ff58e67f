// Linear layers of the description: an optional norm, a packed or dense product, an optional bias.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "bitdistill_decoder.h"

namespace bdk {

// False where it is not a [rows, columns] layer that can be computed.
bool linear_fits(const bdk_linear& linear, std::int64_t rows, std::int64_t columns);

// A layer and where its output [tokens, rows] goes.
struct LinearOutput {
  const bdk_linear& linear;
  float* y;
};

// All layers of x [tokens, columns], packed ones that follow each other in one round of the threads where nothing
// stands between their input and x; `normed` has room for x.  A status of enum bdk_status.
int apply_linears(std::initializer_list<LinearOutput> outputs, const float* x, std::int64_t tokens, float* normed);

// out = gain * x / rms(x), token by token; shared among the threads.
void norm_tokens(const float* x, std::int64_t tokens, std::int64_t size, const float* gain, float eps, float* out);

}  // namespace bdk
