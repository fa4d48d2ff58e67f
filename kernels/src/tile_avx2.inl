// AVX2 with FMA, and with AVX-VNNI where BDK_AVX_VNNI is defined: a step's 32 rows are four vectors.
//
// Without VNNI a dot product is vpmaddubsw, which adds pairs in int16 and saturates: codes up to 15 are far from that,
// and wider ones (nf3's levels, 8-bit codes) are multiplied as their two halves of four bits.
#include <immintrin.h>

#include <cstring>
#include <utility>

#include "instruction_sets.h"
#include "staging.inl"
#include "unroll.h"

namespace bdk {
namespace {

constexpr int kLanes = 8;
constexpr int kStreamTokens = 1;
constexpr int kGemmVectors = 2;
constexpr int kAheadBytes = 4096;
constexpr int kNearBytes = 4096;
constexpr int kFarBytes = 0;
constexpr bool kScalesFields = false;  // their sums would not fit into 16 registers

using Bytes = __m256i;
using Ints = __m256i;
using Floats = __m256;

BDK_INLINE Bytes load(const std::uint8_t* at) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(at)); }
BDK_INLINE Ints load(const std::int32_t* at) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(at)); }
BDK_INLINE Floats load(const float* at) { return _mm256_load_ps(at); }
BDK_INLINE void store(std::uint8_t* at, Bytes value) { _mm256_store_si256(reinterpret_cast<__m256i*>(at), value); }
BDK_INLINE void store(std::int32_t* at, Ints value) { _mm256_store_si256(reinterpret_cast<__m256i*>(at), value); }
BDK_INLINE void store(float* at, Floats value) { _mm256_store_ps(at, value); }
BDK_INLINE void prefetch(const std::uint8_t* at) { _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T0); }
BDK_INLINE void prefetch_far(const std::uint8_t* at) { _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T1); }

BDK_INLINE Ints broadcast(std::int32_t value) { return _mm256_set1_epi32(value); }
BDK_INLINE Floats broadcast(float value) { return _mm256_set1_ps(value); }
BDK_INLINE Bytes broadcast4(const std::int8_t* x) {
  std::int32_t four;
  std::memcpy(&four, x, sizeof four);
  return _mm256_set1_epi32(four);
}

BDK_INLINE Bytes only(Bytes value, int mask) {
  return _mm256_and_si256(value, _mm256_set1_epi8(static_cast<char>(mask)));
}
BDK_INLINE Bytes right(Bytes value, int bits) { return bits == 0 ? value : _mm256_srli_epi32(value, bits); }
BDK_INLINE Ints right_signed(Ints value, int bits) { return _mm256_srai_epi32(value, bits); }
BDK_INLINE Ints left(Ints value, int bits) { return _mm256_sll_epi32(value, _mm_cvtsi32_si128(bits)); }
BDK_INLINE Ints add(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
BDK_INLINE Ints subtract(Ints a, Ints b) { return _mm256_sub_epi32(a, b); }
BDK_INLINE Ints multiply(Ints a, Ints b) { return _mm256_mullo_epi32(a, b); }
BDK_INLINE Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
BDK_INLINE Floats subtract(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
BDK_INLINE Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
BDK_INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
BDK_INLINE Floats to_floats(Ints value) { return _mm256_cvtepi32_ps(value); }

// Half `half` of 8 bytes.
BDK_INLINE Ints nibbles(const std::uint8_t* at, int half) {
  const Ints bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at)));
  return _mm256_and_si256(right(bytes, 4 * half), _mm256_set1_epi32(15));
}

BDK_INLINE Floats load_scales(const TileLayout& layout, const std::uint8_t* scales, int row) {
  if (layout.fp32_scales) return _mm256_load_ps(reinterpret_cast<const float*>(scales) + row);
  return _mm256_cvtph_ps(_mm_load_si128(reinterpret_cast<const __m128i*>(scales + row * 2)));
}

#if defined(BDK_AVX_VNNI)
constexpr int kBlockTokens = 6;  // times two vectors of rows: 12 of 16 registers hold sums
template <bool>
BDK_INLINE Ints dot(Ints sum, Bytes codes, Bytes four) {
  return _mm256_dpbusd_avx_epi32(sum, codes, four);
}
#else
constexpr int kBlockTokens = 4;
template <bool kWide>
BDK_INLINE Ints dot(Ints sum, Bytes codes, Bytes four) {
  const Bytes low = kWide ? only(codes, 15) : codes;
  sum = add(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(low, four), _mm256_set1_epi16(1)));
  if (!kWide) return sum;
  const Bytes high = only(right(codes, 4), 15);
  return add(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(high, four), _mm256_set1_epi16(16)));
}
#endif

// Where `bits` are set, a; elsewhere b.
BDK_INLINE Bytes select(int bits, Bytes a, Bytes b) {
  const Bytes mask = _mm256_set1_epi8(static_cast<char>(bits));
  return _mm256_or_si256(_mm256_and_si256(mask, a), _mm256_andnot_si256(mask, b));
}

constexpr bool kIndexIsCode = true;
using Levels = Bytes;

BDK_INLINE Levels make_levels(const std::uint8_t levels[8]) {
  std::int64_t eight;
  std::memcpy(&eight, levels, sizeof eight);
  return _mm256_set1_epi64x(eight);
}

BDK_INLINE Bytes three_bit_index(Bytes low, Bytes high, int half, int field) {
  const int place = kThirdBitPlaces[field] + half;
  const Bytes third = place < 2 ? _mm256_slli_epi32(high, 2 - place) : right(high, place - 2);
  return _mm256_or_si256(only(right(low, 2 * field), 3), only(third, 4));
}

BDK_INLINE Bytes look_up(const Levels& levels, Bytes index, int) { return _mm256_shuffle_epi8(levels, index); }

// The fp32 path.
constexpr int kFloatTokens = 8;
using FloatTable = Floats;
BDK_INLINE FloatTable float_table(const float levels[16]) { return _mm256_loadu_ps(levels); }
BDK_INLINE Floats float_level(FloatTable table, Ints code) { return _mm256_permutevar8x32_ps(table, code); }
BDK_INLINE Floats signed_scale(Floats level, Floats positive, Floats negative) {
  return _mm256_blendv_ps(positive, negative, level);
}
BDK_INLINE Floats four_bit_level(FloatTable, Ints plane, int place) {
  const Ints code = _mm256_and_si256(right(plane, place), _mm256_set1_epi32(15));
  return to_floats(subtract(code, _mm256_set1_epi32(8)));
}
BDK_INLINE Ints left_by(Ints value, int bits) { return bits == 0 ? value : _mm256_slli_epi32(value, bits); }
BDK_INLINE Ints bytewise_less_128(Ints value) { return _mm256_xor_si256(value, _mm256_set1_epi8(-128)); }
BDK_INLINE Ints dwords(Bytes value) { return value; }

#include "float_tile.inl"
#include "int8_tile.inl"
#include "limits.inl"

}  // namespace
}  // namespace bdk
