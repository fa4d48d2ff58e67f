// Single codes, scales and zero points of a tile: the layout of layout.h, read the plain way.
#pragma once

#include <cstdint>
#include <cstring>

#include "layout.h"

namespace bdk {

BDK_INLINE std::uint8_t code_at(Coding coding, const std::uint8_t* step, int row, int column) {
  const int byte = row * 4 + column % 4;
  switch (coding) {
    case Coding::kFourBit:
      return (step[column / 8 * kPlaneBytes + byte] >> (column % 8 / 4 * 4)) & 15;
    case Coding::kEightBit:
      return step[column / 4 * kPlaneBytes + byte];
    default:
      break;
  }
  const int half = column / 16, field = column % 16 / 4;
  const int low = (step[half * kPlaneBytes + byte] >> (2 * field)) & 3;
  if (coding == Coding::kTwoBit) return static_cast<std::uint8_t>(low);
  const int third = (step[2 * kPlaneBytes + byte] >> (kThirdBitPlaces[field] + half)) & 1;
  return static_cast<std::uint8_t>(low | third << 2);
}

// What an fp32 product takes for a code, before zero point and scale.
BDK_INLINE float level_of(const TileLayout& layout, std::uint8_t code) {
  return layout.coding == Coding::kEightBit ? static_cast<float>(code - 128) : layout.float_levels[code];
}

BDK_INLINE float half_to_float(std::uint16_t half) {
  const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000u) << 16;
  const std::uint32_t exponent = (half >> 10) & 0x1fu, mantissa = half & 0x3ffu;
  float value = static_cast<float>(mantissa) * 5.9604644775390625e-8f;  // zero or subnormal: mantissa * 2^-24
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (exponent == 0x1f) bits = 0x7f800000u | mantissa << 13;
  if (exponent != 0 && exponent != 0x1f) bits = (exponent + 112) << 23 | mantissa << 13;
  bits |= sign;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// `sign` 1: that of nf3's negative levels.
BDK_INLINE float scale_at(const TileLayout& layout, const std::uint8_t* tile, std::int32_t group, int sign, int row) {
  const std::uint8_t* scales = tile + static_cast<std::int64_t>(group) * layout.scale_bytes;
  const int index = sign * kTileRows + row;
  if (layout.fp32_scales) {
    float scale;
    std::memcpy(&scale, scales + index * 4, sizeof scale);
    return scale;
  }
  std::uint16_t half;
  std::memcpy(&half, scales + index * 2, sizeof half);
  return half_to_float(half);
}

BDK_INLINE std::int32_t zero_at(const TileLayout& layout, const std::uint8_t* tile, std::int32_t group, int row) {
  if (!layout.zeros_offset) return layout.fixed_zero;
  const std::uint8_t* zeros = tile + layout.zeros_offset + static_cast<std::int64_t>(group) * kZeroBytes;
  return (zeros[row % kZeroBytes] >> (row / kZeroBytes * 4)) & 15;
}

}  // namespace bdk
