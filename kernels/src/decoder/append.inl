// Writing one key and one value to the cache.
#pragma once

#include "vector_math.inl"
#include "vector_ops.h"

namespace bdk {
namespace {

constexpr float kRoundToWhole = 12582912.0f;  // 1.5 * 2^23: the last bit of the sum is worth 1

// Numbers of one head, narrowed to 16 bits, at most kLanes at a time.
template <typename Put>
inline void narrow_half(const float* x, std::int64_t size, Put put) {
  for_vectors(size, [&](std::int64_t at, int count) {
    std::uint16_t halves[Vec::kLanes];
    store_half(halves, load(x + at, count));
    for (int lane = 0; lane < count; ++lane) put(at + lane, halves[lane]);
  });
}

// The scale is returned: the largest magnitude over 127.
template <typename Put>
inline float narrow_int8(const float* x, std::int64_t size, Put put) {
  Vec most = zero();
  for_vectors(size, [&](std::int64_t at, int count) {
    const Vec some = load(x + at, count);
    most = max(most, max(some, sub(zero(), some)));
  });
  const float peak = largest(most);
  const Vec inverse = broadcast(peak > 0.0f ? 127.0f / peak : 0.0f);
  for_vectors(size, [&](std::int64_t at, int count) {
    float whole[Vec::kLanes];
    store(whole, round(clamp(mul(load(x + at, count), inverse), -127.0f, 127.0f)));
    for (int lane = 0; lane < count; ++lane) {
      const float shifted = whole[lane] + kRoundToWhole;
      std::int32_t bits;
      __builtin_memcpy(&bits, &shifted, sizeof bits);
      put(at + lane, static_cast<std::int8_t>(bits - 0x4b400000));
    }
  });
  return peak / 127.0f;
}

void append(const CachedHead& cache, std::int64_t position, const float* key, const float* value) {
  const std::int64_t size = cache.head_size;
  const std::int64_t key_at = position / kKeyBlock * kKeyBlock * size + position % kKeyBlock;
  const std::int64_t value_at = position * cache.value_stride;
  if (cache.type == BDK_CACHE_INT8) {
    auto* keys = static_cast<std::int8_t*>(cache.keys) + key_at;
    auto* values = static_cast<std::int8_t*>(cache.values) + value_at;
    cache.key_scales[position] =
        narrow_int8(key, size, [&](std::int64_t c, std::int8_t whole) { keys[c * kKeyBlock] = whole; });
    cache.value_scales[position] =
        narrow_int8(value, size, [&](std::int64_t c, std::int8_t whole) { values[c] = whole; });
    return;
  }
  auto* keys = static_cast<std::uint16_t*>(cache.keys) + key_at;
  auto* values = static_cast<std::uint16_t*>(cache.values) + value_at;
  narrow_half(key, size, [&](std::int64_t c, std::uint16_t half) { keys[c * kKeyBlock] = half; });
  narrow_half(value, size, [&](std::int64_t c, std::uint16_t half) { values[c] = half; });
}

}  // namespace
}  // namespace bdk
