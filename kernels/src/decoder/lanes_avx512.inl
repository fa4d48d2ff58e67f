// Sixteen floats of AVX512.  See lanes_scalar.inl for what each function means.
#include <immintrin.h>

#include <cstdint>

namespace bdk {
namespace {

struct Vec {
  static constexpr int kLanes = 16;
  static constexpr int kMaxRows = 4;  // query rows that share a load of keys or values: what 32 registers hold
  __m512 v;
};

inline Vec zero() { return {_mm512_setzero_ps()}; }
inline Vec broadcast(float value) { return {_mm512_set1_ps(value)}; }
inline Vec load(const float* at) { return {_mm512_loadu_ps(at)}; }
inline void store(float* at, Vec x) { _mm512_storeu_ps(at, x.v); }

inline Vec load_half(const std::uint16_t* at) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)))};
}
// Two vectors at once: loads of a whole line are what memory delivers fastest.
inline void load_halves(const std::uint16_t* at, Vec* pair) {
  const __m512i both = _mm512_loadu_si512(at);
  pair[0] = {_mm512_cvtph_ps(_mm512_castsi512_si256(both))};
  pair[1] = {_mm512_cvtph_ps(_mm512_extracti64x4_epi64(both, 1))};
}
inline void store_half(std::uint16_t* at, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT));
}
inline Vec widen_bfloat(__m256i values) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(values), 16))};
}
inline Vec load_bfloat(const std::uint16_t* at) {
  return widen_bfloat(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
}
inline void load_bfloats(const std::uint16_t* at, Vec* pair) {
  const __m512i both = _mm512_loadu_si512(at);
  pair[0] = widen_bfloat(_mm512_castsi512_si256(both));
  pair[1] = widen_bfloat(_mm512_extracti64x4_epi64(both, 1));
}
inline Vec load_int8(const std::int8_t* at) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at))))};
}

inline Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec sub(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec div(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Vec round(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Vec power_of_two(Vec whole) {
  return {_mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(whole.v), _mm512_set1_epi32(127)), 23))};
}
inline float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
inline float largest(Vec a) { return _mm512_reduce_max_ps(a.v); }

}  // namespace
}  // namespace bdk
