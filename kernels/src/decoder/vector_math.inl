// Loops over vectors, and the functions that no instruction computes.  A lanes file comes before it.
#pragma once

#include <cstdint>

#if defined(BDK_NO_UNROLL)
#define BDK_UNROLL
#elif defined(__clang__)
#define BDK_UNROLL _Pragma("unroll")
#else
#define BDK_UNROLL _Pragma("GCC unroll 32")
#endif

namespace bdk {
namespace {

constexpr int kChains = 4;  // of sums that run side by side, to hide the latency of an addition

// Calls each(first, count) for every vector of `size` floats; the last one may hold fewer than kLanes.
template <typename Each>
inline void for_vectors(std::int64_t size, Each each) {
  std::int64_t first = 0;
  for (; first + Vec::kLanes <= size; first += Vec::kLanes) each(first, Vec::kLanes);
  if (first < size) each(first, static_cast<int>(size - first));
}

// The first `count` floats, and zeros after them.
inline Vec load(const float* at, int count) {
  if (count == Vec::kLanes) return load(at);
  float some[Vec::kLanes] = {};
  for (int lane = 0; lane < count; ++lane) some[lane] = at[lane];
  return load(some);
}

inline void store(float* at, Vec x, int count) {
  if (count == Vec::kLanes) return store(at, x);
  float all[Vec::kLanes];
  store(all, x);
  for (int lane = 0; lane < count; ++lane) at[lane] = all[lane];
}

// Where an operand is not a number, max and min give their second one: so that it goes through.
inline Vec clamp(Vec x, float low, float high) { return min(broadcast(high), max(broadcast(low), x)); }

// e^x within 2 units in the last place; below -87.3 what it is there.
inline Vec exponential(Vec x) {
  x = clamp(x, -87.33f, 88.37f);
  const Vec n = round(mul(x, broadcast(1.44269504f)));
  const Vec r = fma(n, broadcast(2.12194440e-4f), fma(n, broadcast(-0.693359375f), x));  // x - n ln 2, in two steps
  Vec p = broadcast(1.9875691500e-4f);
  p = fma(p, r, broadcast(1.3981999507e-3f));
  p = fma(p, r, broadcast(8.3334519073e-3f));
  p = fma(p, r, broadcast(4.1665795894e-2f));
  p = fma(p, r, broadcast(1.6666665459e-1f));
  p = fma(p, r, broadcast(5.0000001201e-1f));
  p = add(fma(mul(p, r), r, r), broadcast(1.0f));
  return mul(p, power_of_two(n));
}

// x / (1 + e^-y)
inline Vec times_sigmoid(Vec x, Vec y) { return div(x, add(broadcast(1.0f), exponential(sub(zero(), y)))); }

inline Vec silu(Vec x) { return times_sigmoid(x, x); }

// GELU by tanh, x/2 (1 + tanh(u)) with u = sqrt(2 / pi) (x + 0.044715 x^3), is x times the sigmoid of 2u.
inline Vec gelu(Vec x) {
  const Vec cubic = fma(mul(mul(x, x), x), broadcast(0.044715f), x);
  return times_sigmoid(x, mul(cubic, broadcast(1.5957691216f)));
}

// tanh(x) = 1 - 2 / (e^2x + 1)
inline Vec hyperbolic_tangent(Vec x) {
  const Vec e = exponential(add(x, x));
  return sub(broadcast(1.0f), div(broadcast(2.0f), add(e, broadcast(1.0f))));
}

}  // namespace
}  // namespace bdk
