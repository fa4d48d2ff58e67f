// What each format means: the one place where a format's numbers are written down for the kernels.
#pragma once

#include <cstdint>

#include "layout.h"

namespace bdk {

struct FormatTraits {
  Coding coding;
  int code_bits;
  bool has_zero_point;
  int scales_per_group;
  bool ternary;  // code 3 does not exist
  int code_shift;
  int fixed_zero;
  float integer_factor;
  float float_factor;
  float float_center;
  float float_levels[8];  // of 2- and 3-bit codes
};

// Null for a value that is not in enum bdk_format.
const FormatTraits* find_format(std::int32_t format);

// The constants of a format, copied into the layout that kernels read.
void apply_format(const FormatTraits& traits, TileLayout* layout);

}  // namespace bdk
