// The layout that kernels read, the same for every instruction set, so that one can be chosen at any time.
//
// A weight is cut into tiles of 32 rows, and a tile is one contiguous stream: the scales of all its groups of columns
// (32 rows beside each other; nf3: those of the positive levels, then those of the negative ones), their zero points
// (16 bytes a group: row r in the low half of byte r, row 16 + r in its high half), then, from a multiple of 64 bytes
// on, the codes: for each group, steps of 16 columns (32 for 3-bit codes).
//
// Rows lie in lanes, so no sum ever runs across lanes: dword r of a vector belongs to row r, and its four bytes to four
// consecutive columns, which is what an int8 dot-product instruction multiplies by four consecutive activations,
// broadcast to all rows.  A plane is 32 such dwords.
//
//   2 bits   one plane: byte b, bits 2f and 2f+1 are column 4f + b; masking with 0x03 << 2f, without a shift, leaves
//            four columns' codes times 4^f
//   3 bits   a 2-bit plane of columns 0..15, another of 16..31, and one of third bits: that of column 16h + 4f + b is
//            bit kThirdBitPlaces[f] + h of byte b.  In the two fields 0 it then needs no shift to be beside the low
//            bits' place, in 1 and 2 none or the same one
//   4 bits   two planes, of columns 0..7 and 8..15: column 4n + b is half n of byte b
//   8 bits   four planes of four columns
//
// The last step of a group is filled with code 0, and activations are staged with zeros there.
#pragma once

#include <cstdint>

#if defined(_MSC_VER)
#define BDK_INLINE __forceinline
#else
#define BDK_INLINE inline __attribute__((always_inline))  // no copy that units with other flags could share
#endif

namespace bdk {

constexpr int kTileRows = 32;
constexpr int kPlaneBytes = 4 * kTileRows;
constexpr int kAlignment = 64;
constexpr int kZeroBytes = kTileRows / 2;  // of one group
constexpr int kThirdBitPlaces[4] = {2, 4, 0, 6};

enum class Coding : std::int32_t { kTwoBit, kThreeBit, kNormalFloat, kFourBit, kEightBit };
constexpr int kCodings = 5;

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

  std::int32_t scale_bytes;   // of one group: of all rows, and for nf3 of both signs
  std::int32_t zeros_offset;  // from the tile's beginning; 0 where the format has none
  std::int32_t steps_offset;
  std::int32_t fp32_scales;  // 1: fp32, 0: fp16

  // int8 activations: value = scale * integer_factor * ((code << code_shift) - zero), all but the scale exact integers
  std::int32_t code_shift;
  std::int32_t fixed_zero;
  float integer_factor;
  // fp32 activations: value = scale * float_factor * (level + float_center - zero), the level of an 8-bit code being
  // code - 128 and that of others float_levels[code], repeated so that a lookup by too many low bits works too
  float float_factor;
  float float_center;
  float float_levels[16];
  // NF3: |level| * 191 of the non-negative levels and |level| * 243 of the negative ones, rounded: see formats.cpp
  std::uint8_t positive_levels[8];
  std::uint8_t negative_levels[8];
  float positive_factor;
  float negative_factor;

  BDK_INLINE std::int32_t steps_of(std::int32_t group) const {
    return group + 1 == groups ? last_group_steps : group_steps;
  }
  BDK_INLINE std::int64_t padded_columns() const {
    return (static_cast<std::int64_t>(groups - 1) * group_steps + last_group_steps) * step_columns;
  }
};

}  // namespace bdk
