// Four floats in plain C++, for machines without a file of their own: compilers make SSE2 or NEON of it.
//
// Each lanes file offers the same functions on its own `Vec`, and vector_ops.inl is written in them.  They live in an
// anonymous namespace, and call no library code, so that no other instruction set's copy can be linked in their place.
#include <cstdint>
#include <cstring>

namespace bdk {
namespace {

struct Vec {
  static constexpr int kLanes = 4;
  static constexpr int kMaxRows = 2;
  float v[kLanes];
};

template <typename Lane>
inline Vec lanes(Lane lane) {
  Vec made;
  for (int i = 0; i < Vec::kLanes; ++i) made.v[i] = lane(i);
  return made;
}

inline std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float widened_half(std::uint16_t half) {
  const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000u) << 16;
  const std::uint32_t exponent = (half >> 10) & 0x1fu, mantissa = half & 0x3ffu;
  if (exponent == 0) return float_of(bits_of(static_cast<float>(mantissa) * 5.9604644775390625e-8f) | sign);
  return float_of(sign | (exponent == 0x1f ? 0x7f800000u : (exponent + 112) << 23) | (mantissa << 13));
}

// Rounds to nearest, ties to even.
inline std::uint16_t narrowed_half(float value) {
  const std::uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<std::uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<std::uint16_t>(sign | 0x7c00u);  // rounds past 65504
  if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 leaves multiples of 2^-24 in the low bits
    const std::uint32_t rounded = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
    return static_cast<std::uint16_t>(sign | rounded);
  }
  return static_cast<std::uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13));
}

inline Vec zero() {
  return lanes([](int) { return 0.0f; });
}
inline Vec broadcast(float value) {
  return lanes([&](int) { return value; });
}
inline Vec load(const float* at) {
  return lanes([&](int i) { return at[i]; });
}
inline void store(float* at, Vec x) { std::memcpy(at, x.v, sizeof x.v); }

inline Vec load_half(const std::uint16_t* at) {
  return lanes([&](int i) { return widened_half(at[i]); });
}
inline void load_halves(const std::uint16_t* at, Vec* pair) {
  pair[0] = load_half(at);
  pair[1] = load_half(at + Vec::kLanes);
}
inline void store_half(std::uint16_t* at, Vec x) {
  for (int i = 0; i < Vec::kLanes; ++i) at[i] = narrowed_half(x.v[i]);
}
inline Vec load_bfloat(const std::uint16_t* at) {
  return lanes([&](int i) { return float_of(static_cast<std::uint32_t>(at[i]) << 16); });
}
inline void load_bfloats(const std::uint16_t* at, Vec* pair) {
  pair[0] = load_bfloat(at);
  pair[1] = load_bfloat(at + Vec::kLanes);
}
inline Vec load_int8(const std::int8_t* at) {
  return lanes([&](int i) { return static_cast<float>(at[i]); });
}

inline Vec add(Vec a, Vec b) {
  return lanes([&](int i) { return a.v[i] + b.v[i]; });
}
inline Vec sub(Vec a, Vec b) {
  return lanes([&](int i) { return a.v[i] - b.v[i]; });
}
inline Vec mul(Vec a, Vec b) {
  return lanes([&](int i) { return a.v[i] * b.v[i]; });
}
inline Vec div(Vec a, Vec b) {
  return lanes([&](int i) { return a.v[i] / b.v[i]; });
}
inline Vec fma(Vec a, Vec b, Vec c) {  // a b + c, rounded once or twice
  return lanes([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
inline Vec max(Vec a, Vec b) {
  return lanes([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline Vec min(Vec a, Vec b) {
  return lanes([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
// To a whole number, below 2^22 in magnitude.
inline Vec round(Vec a) {
  return lanes([&](int i) { return (a.v[i] + 12582912.0f) - 12582912.0f; });
}
// 2^n of whole numbers n from -126 to 127.
inline Vec power_of_two(Vec whole) {
  return lanes([&](int i) { return float_of((bits_of(whole.v[i] + 12582912.0f) - 0x4b400000u + 127u) << 23); });
}
inline float sum(Vec a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
inline float largest(Vec a) {
  float most = a.v[0];
  for (float value : a.v) most = value > most ? value : most;
  return most;
}

}  // namespace
}  // namespace bdk
