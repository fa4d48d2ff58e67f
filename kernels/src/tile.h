// What an instruction set implements: staging of activations, and the product of one tile of 32 rows.
#pragma once

#include <cstdint>

#include "layout.h"

namespace bdk {

// Staged activations: token t starts at values + t * stride and is padded group by group as the layout is;
// sums holds, for each token, the sum of every group.
template <typename Value, typename Sum>
struct Activations {
  const Value* values;
  std::int64_t stride;
  const Sum* sums;
  std::int64_t sums_stride;

  Activations from(std::int64_t token) const {
    return {values + token * stride, stride, sums + token * sums_stride, sums_stride};
  }
};
using Int8Activations = Activations<std::int8_t, std::int32_t>;
using FloatActivations = Activations<float, float>;

struct InstructionSet {
  const char* name;
  // Quantises one token of layout.columns values into padded int8 values and sums; returns the scale (NaN where a
  // value is not finite).
  float (*quantize_token)(const TileLayout& layout, const float* x, std::int8_t* values, std::int32_t* sums);
  // Copies one token into padded values and sums.
  void (*stage_token)(const TileLayout& layout, const float* x, float* values, float* sums);
  // out [tokens][32] = activations times the tile's rows.  With int8 activations every group's sum is an exact
  // integer, and float operations happen in one order: all instruction sets give the same bits.
  void (*int8_tile)(const TileLayout& layout, const std::uint8_t* tile, Int8Activations x, int tokens, float* out);
  void (*float_tile)(const TileLayout& layout, const std::uint8_t* tile, FloatActivations x, int tokens, float* out);
};

}  // namespace bdk
