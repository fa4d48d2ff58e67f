// Staging of activations, included by each instruction set's file and compiled with its flags.
//
// In an anonymous namespace and free of library code, so that the linker can never hand one instruction set's copy to
// another.  Rounding adds and subtracts 1.5 * 2^23, which rounds halves to even in the default rounding mode and
// vectorises everywhere; contraction to fused multiply-adds is off (CMakeLists.txt), so all copies give the same bits.
#include <cstdint>
#include <cstring>

#include "layout.h"

namespace bdk {
namespace {

BDK_INLINE std::uint32_t float_bits(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

BDK_INLINE float bits_float(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Calls visit(first column, columns, padded columns before it, padded columns, group) for each group.
template <typename Visit>
inline void for_each_group(const TileLayout& layout, Visit visit) {
  std::int64_t padded = 0;
  for (std::int32_t group = 0; group < layout.groups; ++group) {
    const std::int32_t first = group * layout.group_size;
    const std::int32_t left = layout.columns - first;
    const std::int32_t columns = left < layout.group_size ? left : layout.group_size;
    const std::int32_t width = layout.steps_of(group) * layout.step_columns;
    visit(first, columns, padded, width, group);
    padded += width;
  }
}

constexpr std::uint32_t kInfinityBits = 0x7f800000u;
constexpr std::uint32_t kNanBits = 0x7fc00000u;

// max(max|x|, 1e-5), or NaN where a value is not finite.
inline float token_peak(const float* x, std::int32_t columns) {
  std::int32_t largest = 0;  // the bits of |x| order like |x|, with NaN above infinity
  for (std::int32_t k = 0; k < columns; ++k) {
    const std::int32_t magnitude = static_cast<std::int32_t>(float_bits(x[k]) & 0x7fffffffu);
    largest = magnitude > largest ? magnitude : largest;
  }
  if (static_cast<std::uint32_t>(largest) >= kInfinityBits) return bits_float(kNanBits);
  const float absmax = bits_float(static_cast<std::uint32_t>(largest));
  return absmax > 1e-5f ? absmax : 1e-5f;
}

inline std::int32_t quantize_values(const float* x, std::int32_t columns, float inverse, std::int8_t* values) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: the last bit of the sum is worth 1
  std::int32_t sum = 0;
  for (std::int32_t k = 0; k < columns; ++k) {
    const float rounded = x[k] * inverse + kRound;
    std::int32_t q = static_cast<std::int32_t>(float_bits(rounded)) - static_cast<std::int32_t>(0x4b400000);
    q = q < -128 ? -128 : q;
    q = q > 127 ? 127 : q;
    values[k] = static_cast<std::int8_t>(q);
    sum += q;
  }
  return sum;
}

void quantize_token(const TileLayout& layout, const float* x, bool grouped, std::int8_t* values, std::int32_t* sums,
                    float* scales) {
  float peak = grouped ? 0.0f : token_peak(x, layout.columns);
  if (!grouped) scales[0] = peak / 127.0f;
  for_each_group(layout, [&](std::int32_t first, std::int32_t columns, std::int64_t padded, std::int32_t width,
                             std::int32_t group) {
    if (grouped) {
      peak = token_peak(x + first, columns);
      scales[group] = peak / 127.0f;
    }
    if (peak != peak) {  // the scale is NaN, and so will be the product
      std::memset(values + padded, 0, static_cast<std::size_t>(width));
      sums[group] = 0;
      return;
    }
    sums[group] = quantize_values(x + first, columns, 127.0f / peak, values + padded);
    std::memset(values + padded + columns, 0, static_cast<std::size_t>(width - columns));
  });
}

void stage_token(const TileLayout& layout, const float* x, float* values, float* sums) {
  for_each_group(layout, [&](std::int32_t first, std::int32_t columns, std::int64_t padded, std::int32_t width,
                             std::int32_t group) {
    std::memcpy(values + padded, x + first, static_cast<std::size_t>(columns) * sizeof(float));
    std::memset(values + padded + columns, 0, static_cast<std::size_t>(width - columns) * sizeof(float));
    float lanes[16] = {};  // sixteen running sums: vectorises without reordering a single one
    std::int32_t k = 0;
    for (; k + 16 <= columns; k += 16)
      for (std::int32_t lane = 0; lane < 16; ++lane) lanes[lane] += x[first + k + lane];
    for (std::int32_t lane = 0; k < columns; ++k, ++lane) lanes[lane] += x[first + k];
    float sum = 0.0f;
    for (float lane : lanes) sum += lane;
    sums[group] = sum;
  });
}

}  // namespace
}  // namespace bdk
