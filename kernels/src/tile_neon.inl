// ARM NEON with the dot-product instructions, and with those of i8mm where BDK_I8MM is defined: a step's 32 rows are
// eight vectors.
//
// sdot multiplies signed bytes, which holds codes up to 127.  Wider ones are its business with i8mm (usdot); without,
// they lose 128, and 128 times the activations is added back.
#include <arm_neon.h>

#include <cstring>
#include <utility>

#include "instruction_sets.h"
#include "staging.inl"
#include "unroll.h"

namespace bdk {
namespace {

constexpr int kLanes = 4;
constexpr int kStreamTokens = 1;
constexpr int kBlockTokens = 6;  // times four vectors of rows: 24 of 32 registers hold sums
constexpr int kGemmVectors = 4;
constexpr int kAheadBytes = 2048;
constexpr int kNearBytes = 2048;
constexpr int kFarBytes = 0;
constexpr bool kScalesFields = false;

using Bytes = uint8x16_t;
using Ints = int32x4_t;
using Floats = float32x4_t;

BDK_INLINE Bytes load(const std::uint8_t* at) { return vld1q_u8(at); }
BDK_INLINE Ints load(const std::int32_t* at) { return vld1q_s32(at); }
BDK_INLINE Floats load(const float* at) { return vld1q_f32(at); }
BDK_INLINE void store(std::uint8_t* at, Bytes value) { vst1q_u8(at, value); }
BDK_INLINE void store(std::int32_t* at, Ints value) { vst1q_s32(at, value); }
BDK_INLINE void store(float* at, Floats value) { vst1q_f32(at, value); }
BDK_INLINE void prefetch(const std::uint8_t* at) { __builtin_prefetch(at); }
BDK_INLINE void prefetch_far(const std::uint8_t* at) { __builtin_prefetch(at, 0, 2); }

BDK_INLINE Ints broadcast(std::int32_t value) { return vdupq_n_s32(value); }
BDK_INLINE Floats broadcast(float value) { return vdupq_n_f32(value); }
BDK_INLINE Bytes broadcast4(const std::int8_t* x) {
  std::int32_t four;
  std::memcpy(&four, x, sizeof four);
  return vreinterpretq_u8_s32(vdupq_n_s32(four));
}

BDK_INLINE Bytes shifted(Bytes value, int left) {  // dwords; to the right where negative
  return vreinterpretq_u8_u32(vshlq_u32(vreinterpretq_u32_u8(value), vdupq_n_s32(left)));
}
BDK_INLINE Bytes only(Bytes value, int mask) { return vandq_u8(value, vdupq_n_u8(static_cast<std::uint8_t>(mask))); }
BDK_INLINE Bytes right(Bytes value, int bits) { return bits == 0 ? value : shifted(value, -bits); }
BDK_INLINE Ints right_signed(Ints value, int bits) { return vshlq_s32(value, vdupq_n_s32(-bits)); }
BDK_INLINE Ints left(Ints value, int bits) { return vshlq_s32(value, vdupq_n_s32(bits)); }
BDK_INLINE Ints add(Ints a, Ints b) { return vaddq_s32(a, b); }
BDK_INLINE Ints subtract(Ints a, Ints b) { return vsubq_s32(a, b); }
BDK_INLINE Ints multiply(Ints a, Ints b) { return vmulq_s32(a, b); }
BDK_INLINE Floats add(Floats a, Floats b) { return vaddq_f32(a, b); }
BDK_INLINE Floats subtract(Floats a, Floats b) { return vsubq_f32(a, b); }
BDK_INLINE Floats multiply(Floats a, Floats b) { return vmulq_f32(a, b); }
BDK_INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
BDK_INLINE Floats to_floats(Ints value) { return vcvtq_f32_s32(value); }

// Half `half` of 4 bytes.
BDK_INLINE Ints nibbles(const std::uint8_t* at, int half) {
  std::uint32_t word;
  std::memcpy(&word, at, sizeof word);
  const uint32x4_t bytes = vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(word))));
  return vreinterpretq_s32_u32(vandq_u32(vshlq_u32(bytes, vdupq_n_s32(-4 * half)), vdupq_n_u32(15)));
}

BDK_INLINE Floats load_scales(const TileLayout& layout, const std::uint8_t* scales, int row) {
  if (layout.fp32_scales) return vld1q_f32(reinterpret_cast<const float*>(scales) + row);
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const std::uint16_t*>(scales) + row)));
}

template <bool kWide>
BDK_INLINE Ints dot(Ints sum, Bytes codes, Bytes four) {
  const int8x16_t x = vreinterpretq_s8_u8(four);
  if (!kWide) return vdotq_s32(sum, vreinterpretq_s8_u8(codes), x);
#if defined(BDK_I8MM)
  return vusdotq_s32(sum, codes, x);
#else
  const int8x16_t half = vdupq_n_s8(64);
  const int8x16_t less = vreinterpretq_s8_u8(veorq_u8(codes, vdupq_n_u8(128)));
  return vdotq_s32(vdotq_s32(vdotq_s32(sum, less, x), half, x), half, x);
#endif
}

// Where `bits` are set, a; elsewhere b.
BDK_INLINE Bytes select(int bits, Bytes a, Bytes b) {
  return vbslq_u8(vdupq_n_u8(static_cast<std::uint8_t>(bits)), a, b);
}

constexpr bool kIndexIsCode = true;
using Levels = Bytes;

BDK_INLINE Levels make_levels(const std::uint8_t levels[8]) {
  const uint8x8_t eight = vld1_u8(levels);
  return vcombine_u8(eight, eight);
}

BDK_INLINE Bytes three_bit_index(Bytes low, Bytes high, int half, int field) {
  const int place = kThirdBitPlaces[field] + half;
  return only(select(3, right(low, 2 * field), shifted(high, 2 - place)), 7);
}

BDK_INLINE Bytes look_up(const Levels& levels, Bytes index, int) { return vqtbl1q_u8(levels, index); }

// The fp32 path.
constexpr int kFloatTokens = 8;
using FloatTable = uint8x16x2_t;  // eight floats
BDK_INLINE FloatTable float_table(const float levels[16]) {
  return {{vreinterpretq_u8_f32(vld1q_f32(levels)), vreinterpretq_u8_f32(vld1q_f32(levels + 4))}};
}
BDK_INLINE Floats float_level(FloatTable table, Bytes code) {
  const uint32x4_t index = vandq_u32(vreinterpretq_u32_u8(code), vdupq_n_u32(7));
  const uint32x4_t bytes = vmlaq_n_u32(vdupq_n_u32(0x03020100u), index, 0x04040404u);
  return vreinterpretq_f32_u8(vqtbl2q_u8(table, vreinterpretq_u8_u32(bytes)));
}
BDK_INLINE Floats signed_scale(Floats level, Floats positive, Floats negative) {
  return vbslq_f32(vcltzq_f32(level), negative, positive);
}
BDK_INLINE Floats four_bit_level(FloatTable, Bytes plane, int place) {
  const uint32x4_t code = vandq_u32(vreinterpretq_u32_u8(right(plane, place)), vdupq_n_u32(15));
  return to_floats(subtract(vreinterpretq_s32_u32(code), broadcast(8)));
}
BDK_INLINE Bytes left_by(Bytes value, int bits) { return shifted(value, bits); }
BDK_INLINE Bytes bytewise_less_128(Bytes value) { return veorq_u8(value, vdupq_n_u8(128)); }
BDK_INLINE Ints dwords(Bytes value) { return vreinterpretq_s32_u8(value); }

#include "float_tile.inl"
#include "int8_tile.inl"
#include "limits.inl"

}  // namespace
}  // namespace bdk
