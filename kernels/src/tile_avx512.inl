// AVX512 with VNNI, and with VBMI where BDK_VBMI is defined: a step's 32 rows are two vectors, one lane per row.
//
// VBMI's vpermb takes an index of six bits from each byte.  Its tables hold a level at every index whose code bits say
// so, whatever the others are, so a 3-bit code is looked up where it stands: of a step's eight quads only those of
// field 3 are shifted.  Without VBMI codes are shifted to the low bits, and vpshufb looks levels up.
#include <immintrin.h>

#include <cstring>
#include <utility>

#include "instruction_sets.h"
#include "staging.inl"
#include "unroll.h"

namespace bdk {
namespace {

constexpr int kLanes = 16;
constexpr int kStreamTokens = 12;
constexpr int kBlockTokens = 12;  // times two vectors of rows: 24 of 32 registers hold sums
constexpr int kGemmVectors = 2;
constexpr int kAheadBytes = 4096;
constexpr int kNearBytes = 1024;
constexpr int kFarBytes = 8192;
constexpr bool kScalesFields = true;

using Bytes = __m512i;
using Ints = __m512i;
using Floats = __m512;

BDK_INLINE Bytes load(const std::uint8_t* at) { return _mm512_load_si512(at); }
BDK_INLINE Ints load(const std::int32_t* at) { return _mm512_load_si512(at); }
BDK_INLINE Floats load(const float* at) { return _mm512_load_ps(at); }
BDK_INLINE void store(std::uint8_t* at, Bytes value) { _mm512_store_si512(at, value); }
BDK_INLINE void store(std::int32_t* at, Ints value) { _mm512_store_si512(at, value); }
BDK_INLINE void store(float* at, Floats value) { _mm512_store_ps(at, value); }
BDK_INLINE void prefetch(const std::uint8_t* at) { _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T0); }
BDK_INLINE void prefetch_far(const std::uint8_t* at) { _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T1); }

BDK_INLINE Ints broadcast(std::int32_t value) { return _mm512_set1_epi32(value); }
BDK_INLINE Floats broadcast(float value) { return _mm512_set1_ps(value); }
BDK_INLINE Bytes broadcast4(const std::int8_t* x) {
  std::int32_t four;
  std::memcpy(&four, x, sizeof four);
  return _mm512_set1_epi32(four);
}

BDK_INLINE Bytes only(Bytes value, int mask) {
  return _mm512_and_si512(value, _mm512_set1_epi8(static_cast<char>(mask)));
}
BDK_INLINE Bytes right(Bytes value, int bits) { return bits == 0 ? value : _mm512_srli_epi32(value, bits); }
BDK_INLINE Ints right_signed(Ints value, int bits) { return _mm512_srai_epi32(value, bits); }
BDK_INLINE Ints left(Ints value, int bits) { return _mm512_sll_epi32(value, _mm_cvtsi32_si128(bits)); }
BDK_INLINE Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
BDK_INLINE Ints subtract(Ints a, Ints b) { return _mm512_sub_epi32(a, b); }
BDK_INLINE Ints multiply(Ints a, Ints b) { return _mm512_mullo_epi32(a, b); }
BDK_INLINE Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
BDK_INLINE Floats subtract(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
BDK_INLINE Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
BDK_INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
BDK_INLINE Floats to_floats(Ints value) { return _mm512_cvtepi32_ps(value); }

// Half `half` of 16 bytes.
BDK_INLINE Ints nibbles(const std::uint8_t* at, int half) {
  const Ints bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
  return _mm512_and_si512(right(bytes, 4 * half), _mm512_set1_epi32(15));
}

BDK_INLINE Floats load_scales(const TileLayout& layout, const std::uint8_t* scales, int row) {
  if (layout.fp32_scales) return _mm512_load_ps(reinterpret_cast<const float*>(scales) + row);
  return _mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(scales + row * 2)));
}

template <bool>
BDK_INLINE Ints dot(Ints sum, Bytes codes, Bytes four) {
  return _mm512_dpbusd_epi32(sum, codes, four);
}

// Where `bits` are set, a; elsewhere b.
BDK_INLINE Bytes select(int bits, Bytes a, Bytes b) {
  return _mm512_ternarylogic_epi32(_mm512_set1_epi8(static_cast<char>(bits)), a, b, 0xCA);
}

#if defined(BDK_VBMI)
constexpr bool kIndexIsCode = false;

// Of fields 0 and 3, 1, and 2.
struct Levels {
  Bytes tables[3];
};

BDK_INLINE Levels make_levels(const std::uint8_t levels[8]) {
  alignas(kAlignment) std::uint8_t tables[3][64];
  for (int index = 0; index < 64; ++index) {
    tables[0][index] = levels[index & 7];
    tables[1][index] = levels[(index >> 2) & 7];
    tables[2][index] = levels[(index >> 4) | ((index & 1) << 2)];
  }
  return {{load(tables[0]), load(tables[1]), load(tables[2])}};
}

BDK_INLINE Bytes three_bit_index(Bytes low, Bytes high, int half, int field) {
  const Bytes third = right(high, half);
  if (field == 3) return select(3, right(low, 6), right(third, kThirdBitPlaces[3] - kThirdBitPlaces[0]));
  return select(3 << (2 * field), low, third);
}

BDK_INLINE Bytes look_up(const Levels& levels, Bytes index, int field) {
  return _mm512_permutexvar_epi8(index, levels.tables[field % 3]);
}
#else
constexpr bool kIndexIsCode = true;
using Levels = Bytes;

BDK_INLINE Levels make_levels(const std::uint8_t levels[8]) {
  std::int64_t eight;
  std::memcpy(&eight, levels, sizeof eight);
  return _mm512_set1_epi64(eight);
}

BDK_INLINE Bytes three_bit_index(Bytes low, Bytes high, int half, int field) {
  const int place = kThirdBitPlaces[field] + half;
  const Bytes third = place < 2 ? _mm512_slli_epi32(high, 2 - place) : right(high, place - 2);
  return only(select(3, right(low, 2 * field), third), 7);
}

BDK_INLINE Bytes look_up(const Levels& levels, Bytes index, int) { return _mm512_shuffle_epi8(levels, index); }
#endif

// The fp32 path.
constexpr int kFloatTokens = 6;
using FloatTable = Floats;
BDK_INLINE FloatTable float_table(const float levels[16]) { return _mm512_loadu_ps(levels); }
BDK_INLINE Floats float_level(FloatTable table, Ints code) { return _mm512_permutexvar_ps(code, table); }
BDK_INLINE Floats signed_scale(Floats level, Floats positive, Floats negative) {
  return _mm512_mask_blend_ps(_mm512_movepi32_mask(_mm512_castps_si512(level)), positive, negative);
}
BDK_INLINE Floats four_bit_level(FloatTable table, Ints plane, int place) {
  return float_level(table, right(plane, place));  // a table of 16
}
BDK_INLINE Ints left_by(Ints value, int bits) { return bits == 0 ? value : _mm512_slli_epi32(value, bits); }
BDK_INLINE Ints bytewise_less_128(Ints value) { return _mm512_xor_si512(value, _mm512_set1_epi8(-128)); }
BDK_INLINE Ints dwords(Bytes value) { return value; }

#include "float_tile.inl"
#include "int8_tile.inl"
#include "limits.inl"

}  // namespace
}  // namespace bdk
