// Four floats of NEON, which every 64-bit ARM has.  See lanes_scalar.inl for what each function means.
#include <arm_neon.h>

#include <cstdint>

namespace bdk {
namespace {

struct Vec {
  static constexpr int kLanes = 4;
  static constexpr int kMaxRows = 4;
  float32x4_t v;
};

inline Vec zero() { return {vdupq_n_f32(0.0f)}; }
inline Vec broadcast(float value) { return {vdupq_n_f32(value)}; }
inline Vec load(const float* at) { return {vld1q_f32(at)}; }
inline void store(float* at, Vec x) { vst1q_f32(at, x.v); }

inline Vec load_half(const std::uint16_t* at) { return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(at)))}; }
inline void load_halves(const std::uint16_t* at, Vec* pair) {
  const float16x8_t both = vreinterpretq_f16_u16(vld1q_u16(at));
  pair[0] = {vcvt_f32_f16(vget_low_f16(both))};
  pair[1] = {vcvt_high_f32_f16(both)};
}
inline void store_half(std::uint16_t* at, Vec x) { vst1_u16(at, vreinterpret_u16_f16(vcvt_f16_f32(x.v))); }
inline Vec load_bfloat(const std::uint16_t* at) { return {vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(at), 16))}; }
inline void load_bfloats(const std::uint16_t* at, Vec* pair) {
  pair[0] = load_bfloat(at);
  pair[1] = load_bfloat(at + Vec::kLanes);
}
inline Vec load_int8(const std::int8_t* at) {
  std::int32_t four;
  __builtin_memcpy(&four, at, sizeof four);
  const int8x8_t bytes = vreinterpret_s8_s32(vdup_n_s32(four));
  return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(bytes))))};
}

inline Vec add(Vec a, Vec b) { return {vaddq_f32(a.v, b.v)}; }
inline Vec sub(Vec a, Vec b) { return {vsubq_f32(a.v, b.v)}; }
inline Vec mul(Vec a, Vec b) { return {vmulq_f32(a.v, b.v)}; }
inline Vec div(Vec a, Vec b) { return {vdivq_f32(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
inline Vec max(Vec a, Vec b) { return {vmaxq_f32(a.v, b.v)}; }  // not a number where either is none
inline Vec min(Vec a, Vec b) { return {vminq_f32(a.v, b.v)}; }
inline Vec round(Vec a) { return {vrndnq_f32(a.v)}; }
inline Vec power_of_two(Vec whole) {
  return {vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(whole.v), vdupq_n_s32(127)), 23))};
}
inline float sum(Vec a) { return vaddvq_f32(a.v); }
inline float largest(Vec a) { return vmaxvq_f32(a.v); }

}  // namespace
}  // namespace bdk
