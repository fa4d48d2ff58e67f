// The layout that kernels read, the same for every instruction set, so that one can be chosen at any time.
//
// A weight is cut into tiles of 32 rows.  A tile is one contiguous stream: for each group of columns a header (scales,
// then zero points, of the 32 rows), then steps of 16 columns (2-bit codes) or 32 columns (3-bit codes).
//
// A 2-bit step is 32 dwords, dword r for row r: byte b, field f (bits 2f and 2f+1) is the code of column 4f + b.
// Masking with 0x03 << 2f therefore leaves the codes of four consecutive columns in the four bytes of a row, which is
// what an int8 dot-product instruction multiplies by four consecutive activations, broadcast to all rows.  Rows lie in
// lanes, so no sum ever runs across lanes.
//
// A 3-bit step is the 2-bit plane of columns 0..15, that of columns 16..31, and 32 dwords of third bits:
// byte b, bit 4h + f is that of column 16h + 4f + b.
//
// The last step of a group is filled with code 0, and activations are staged with zeros there.
#pragma once

#include <cstdint>

namespace bdk {

constexpr int kTileRows = 32;
constexpr int kPlaneBytes = 4 * kTileRows;  // one 2-bit plane of 16 columns, or one 1-bit plane of 32 columns
constexpr int kAlignment = 64;

enum class Coding : std::int32_t { kTwoBit, kThreeBit, kNormalFloat };

// What a kernel has to know about a weight.  Plain data: it crosses translation units compiled with other flags.
struct TileLayout {
  Coding coding;
  std::int32_t step_columns;  // 16 or 32
  std::int32_t step_bytes;
  std::int32_t groups;
  std::int32_t group_size;  // columns of a group; the last group may have fewer
  std::int32_t group_steps;
  std::int32_t last_group_steps;
  std::int32_t columns;

  std::int32_t header_bytes;
  std::int32_t zeros_offset;  // of the zero points in the header; 0 where the format has none
  std::int32_t fp32_scales;   // 1: fp32, 0: fp16

  // int8 activations: value = scale * integer_factor * ((code << code_shift) - zero), all but the scale exact integers
  std::int32_t code_shift;
  std::int32_t fixed_zero;
  float integer_factor;
  // fp32 activations: value = scale * float_factor * (float_levels[code] + float_center - zero)
  float float_factor;
  float float_center;
  float float_levels[8];  // of a 2-bit code: repeated, so that a lookup by the low three bits works too
  // NF3: |level| * 191 of the non-negative levels and |level| * 243 of the negative ones, rounded: see formats.cpp
  std::uint8_t positive_levels[8];
  std::uint8_t negative_levels[8];
  float positive_factor;
  float negative_factor;

  std::int32_t steps_of(std::int32_t group) const { return group + 1 == groups ? last_group_steps : group_steps; }
  std::int64_t padded_columns() const {
    return (static_cast<std::int64_t>(groups - 1) * group_steps + last_group_steps) * step_columns;
  }
};

}  // namespace bdk
