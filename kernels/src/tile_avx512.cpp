// AVX512 with VNNI: a step's 32 rows are two vectors, one lane per row.
//
// int8: codes stay unsigned and go straight into vpdpbusd; the zero point is taken off once per group with the sum of
// the activations.  With few tokens a 2-bit code is not even shifted: masking leaves field f scaled by 4^f, each field
// has its own accumulator, and the accumulators are shifted right once per group, exactly.  More tokens share one
// decoded vector among up to 24 accumulators.
// fp32: one shift and one table lookup (vpermps, whose index needs no masking) decode 16 weights, then one fused
// multiply-add per token.
#include <immintrin.h>

#include "instruction_sets.h"
#include "staging.inl"

#if defined(BDK_NO_UNROLL)
#define BDK_UNROLL
#elif defined(__clang__)
#define BDK_UNROLL _Pragma("unroll")
#else
#define BDK_UNROLL _Pragma("GCC unroll 32")
#endif

namespace bdk {
namespace {

constexpr int kLanes = 16;
constexpr int kVectors = kTileRows / kLanes;
constexpr int kFields = 4;
constexpr int kPrefetchBytes = 8192;  // about what DRAM delivers to one core in its own latency

inline __m512i load(const std::uint8_t* at) { return _mm512_load_si512(at); }

inline __m512i broadcast4(const std::int8_t* x) {
  std::int32_t four;
  std::memcpy(&four, x, sizeof four);
  return _mm512_set1_epi32(four);
}

inline __m512 load_scales(const TileLayout& layout, const std::uint8_t* header, int first) {
  if (layout.fp32_scales) return _mm512_load_ps(reinterpret_cast<const float*>(header) + first);
  return _mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(header + first * 2)));
}

inline __m512i load_zeros(const TileLayout& layout, const std::uint8_t* header, int first) {
  if (!layout.zeros_offset) return _mm512_set1_epi32(layout.fixed_zero);
  return _mm512_cvtepu8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(header + layout.zeros_offset + first)));
}

inline void prefetch_step(const std::uint8_t* at, int bytes) {
  for (int line = 0; line < bytes; line += 64)
    _mm_prefetch(reinterpret_cast<const char*>(at + kPrefetchBytes + line), _MM_HINT_T0);
}

// The 3-bit codes of `field` of column half `half` in each byte: low two bits and the third one.
inline __m512i three_bit_codes(__m512i low, __m512i high, int half, int field) {
  const int place = 4 * half + field;  // of the third bit; it belongs at bit 2
  const __m512i third = place < 2 ? _mm512_slli_epi32(high, 2 - place) : _mm512_srli_epi32(high, place - 2);
  const __m512i third_only = _mm512_and_si512(third, _mm512_set1_epi8(4));
  const __m512i two = _mm512_srli_epi32(low, 2 * field);
  return _mm512_ternarylogic_epi32(_mm512_set1_epi8(3), two, third_only, 0xEA);  // (mask & two) | third
}

// Adds an exact group sum to the 16 rows of one token: scale * ((dot << shift) - zero * sum(x)).
inline void flush_affine(const TileLayout& layout, const std::uint8_t* header, int vector, __m512i dot,
                         std::int32_t x_sum, float* out) {
  const __m512i zeros = load_zeros(layout, header, vector * kLanes);
  const __m512i shifted = _mm512_sll_epi32(dot, _mm_cvtsi32_si128(layout.code_shift));
  const __m512i value = _mm512_sub_epi32(shifted, _mm512_mullo_epi32(zeros, _mm512_set1_epi32(x_sum)));
  const __m512 step =
      _mm512_mul_ps(load_scales(layout, header, vector * kLanes), _mm512_set1_ps(layout.integer_factor));
  float* sum = out + vector * kLanes;
  _mm512_store_ps(sum, _mm512_add_ps(_mm512_load_ps(sum), _mm512_mul_ps(step, _mm512_cvtepi32_ps(value))));
}

template <int kTokens>
void two_bit_int8(const TileLayout& layout, const std::uint8_t* at, Int8Activations x, float* out) {
  constexpr bool kSplit = kTokens <= 2;  // an accumulator for each field: no shifts, and enough chains to hide latency
  constexpr int kParts = kSplit ? kFields : 1;
  const std::int8_t* values = x.values;
  for (std::int32_t group = 0; group < layout.groups; ++group) {
    const std::uint8_t* header = at;
    at += layout.header_bytes;
    __m512i dot[kTokens][kParts][kVectors];
    BDK_UNROLL
    for (int t = 0; t < kTokens; ++t) BDK_UNROLL
    for (int part = 0; part < kParts; ++part) BDK_UNROLL
    for (int v = 0; v < kVectors; ++v) dot[t][part][v] = _mm512_setzero_si512();
    for (std::int32_t step = layout.steps_of(group); step > 0; --step) {
      if (kSplit) prefetch_step(at, kPlaneBytes);
      const __m512i low[kVectors] = {load(at), load(at + 64)};
      BDK_UNROLL
      for (int field = 0; field < kFields; ++field) {
        __m512i codes[kVectors];
        BDK_UNROLL
        for (int v = 0; v < kVectors; ++v)
          codes[v] = kSplit ? _mm512_and_si512(low[v], _mm512_set1_epi8(static_cast<char>(3 << (2 * field))))
                            : _mm512_and_si512(_mm512_srli_epi32(low[v], 2 * field), _mm512_set1_epi8(3));
        BDK_UNROLL
        for (int t = 0; t < kTokens; ++t) {
          const __m512i four = broadcast4(values + t * x.stride + 4 * field);
          BDK_UNROLL
          for (int v = 0; v < kVectors; ++v)
            dot[t][kSplit ? field : 0][v] = _mm512_dpbusd_epi32(dot[t][kSplit ? field : 0][v], codes[v], four);
        }
      }
      at += kPlaneBytes;
      values += 16;
    }
    BDK_UNROLL
    for (int t = 0; t < kTokens; ++t) BDK_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      __m512i sum = dot[t][0][v];
      BDK_UNROLL
      for (int part = 1; part < kParts; ++part)
        sum = _mm512_add_epi32(sum, _mm512_srai_epi32(dot[t][part][v], 2 * part));
      flush_affine(layout, header, v, sum, x.sums[t * x.sums_stride + group], out + t * kTileRows);
    }
  }
}

template <int kTokens>
void three_bit_int8(const TileLayout& layout, const std::uint8_t* at, Int8Activations x, float* out) {
  constexpr int kParts = kTokens <= 2 ? kFields : 1;  // more chains of sums where there are few tokens
  const std::int8_t* values = x.values;
  for (std::int32_t group = 0; group < layout.groups; ++group) {
    const std::uint8_t* header = at;
    at += layout.header_bytes;
    __m512i dot[kTokens][kParts][kVectors];
    BDK_UNROLL
    for (int t = 0; t < kTokens; ++t) BDK_UNROLL
    for (int part = 0; part < kParts; ++part) BDK_UNROLL
    for (int v = 0; v < kVectors; ++v) dot[t][part][v] = _mm512_setzero_si512();
    for (std::int32_t step = layout.steps_of(group); step > 0; --step) {
      if (kTokens <= 2) prefetch_step(at, 3 * kPlaneBytes);
      const __m512i high[kVectors] = {load(at + 2 * kPlaneBytes), load(at + 2 * kPlaneBytes + 64)};
      BDK_UNROLL
      for (int half = 0; half < 2; ++half) {
        const __m512i low[kVectors] = {load(at + half * kPlaneBytes), load(at + half * kPlaneBytes + 64)};
        BDK_UNROLL
        for (int field = 0; field < kFields; ++field) {
          __m512i codes[kVectors];
          BDK_UNROLL
          for (int v = 0; v < kVectors; ++v) codes[v] = three_bit_codes(low[v], high[v], half, field);
          BDK_UNROLL
          for (int t = 0; t < kTokens; ++t) {
            const __m512i four = broadcast4(values + t * x.stride + 16 * half + 4 * field);
            BDK_UNROLL
            for (int v = 0; v < kVectors; ++v)
              dot[t][field % kParts][v] = _mm512_dpbusd_epi32(dot[t][field % kParts][v], codes[v], four);
          }
        }
      }
      at += 3 * kPlaneBytes;
      values += 32;
    }
    BDK_UNROLL
    for (int t = 0; t < kTokens; ++t) BDK_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      __m512i sum = dot[t][0][v];
      BDK_UNROLL
      for (int part = 1; part < kParts; ++part) sum = _mm512_add_epi32(sum, dot[t][part][v]);
      flush_affine(layout, header, v, sum, x.sums[t * x.sums_stride + group], out + t * kTileRows);
    }
  }
}

inline __m512i byte_table(const std::uint8_t levels[8]) {
  std::int64_t eight;
  std::memcpy(&eight, levels, sizeof eight);
  return _mm512_set1_epi64(eight);
}

// NF3: one lookup and one exact sum for each sign, because each sign has its own scale.
template <int kTokens>
void normal_float_int8(const TileLayout& layout, const std::uint8_t* at, Int8Activations x, float* out) {
  constexpr int kParts = kTokens == 1 ? 2 : 1;
  const __m512i tables[2] = {byte_table(layout.positive_levels), byte_table(layout.negative_levels)};
  const std::int8_t* values = x.values;
  for (std::int32_t group = 0; group < layout.groups; ++group) {
    const std::uint8_t* header = at;
    at += layout.header_bytes;
    __m512i dot[kTokens][kParts][2][kVectors];
    BDK_UNROLL
    for (int t = 0; t < kTokens; ++t) BDK_UNROLL
    for (int part = 0; part < kParts; ++part) BDK_UNROLL
    for (int sign = 0; sign < 2; ++sign) BDK_UNROLL
    for (int v = 0; v < kVectors; ++v) dot[t][part][sign][v] = _mm512_setzero_si512();
    for (std::int32_t step = layout.steps_of(group); step > 0; --step) {
      if (kTokens == 1) prefetch_step(at, 3 * kPlaneBytes);
      const __m512i high[kVectors] = {load(at + 2 * kPlaneBytes), load(at + 2 * kPlaneBytes + 64)};
      BDK_UNROLL
      for (int half = 0; half < 2; ++half) {
        const __m512i low[kVectors] = {load(at + half * kPlaneBytes), load(at + half * kPlaneBytes + 64)};
        BDK_UNROLL
        for (int field = 0; field < kFields; ++field) {
          __m512i levels[2][kVectors];
          BDK_UNROLL
          for (int v = 0; v < kVectors; ++v) {
            const __m512i codes = three_bit_codes(low[v], high[v], half, field);
            levels[0][v] = _mm512_shuffle_epi8(tables[0], codes);
            levels[1][v] = _mm512_shuffle_epi8(tables[1], codes);
          }
          BDK_UNROLL
          for (int t = 0; t < kTokens; ++t) {
            const __m512i four = broadcast4(values + t * x.stride + 16 * half + 4 * field);
            BDK_UNROLL
            for (int sign = 0; sign < 2; ++sign) BDK_UNROLL
            for (int v = 0; v < kVectors; ++v)
              dot[t][field % kParts][sign][v] =
                  _mm512_dpbusd_epi32(dot[t][field % kParts][sign][v], levels[sign][v], four);
          }
        }
      }
      at += 3 * kPlaneBytes;
      values += 32;
    }
    const __m512 factors[2] = {_mm512_set1_ps(layout.positive_factor), _mm512_set1_ps(layout.negative_factor)};
    BDK_UNROLL
    for (int t = 0; t < kTokens; ++t) BDK_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      float* sum = out + t * kTileRows + v * kLanes;
      __m512 product[2];
      BDK_UNROLL
      for (int sign = 0; sign < 2; ++sign) {
        __m512i exact = dot[t][0][sign][v];
        if (kParts == 2) exact = _mm512_add_epi32(exact, dot[t][kParts - 1][sign][v]);
        const __m512 scale = _mm512_mul_ps(load_scales(layout, header, sign * kTileRows + v * kLanes), factors[sign]);
        product[sign] = _mm512_mul_ps(scale, _mm512_cvtepi32_ps(exact));
      }
      _mm512_store_ps(sum, _mm512_sub_ps(_mm512_add_ps(_mm512_load_ps(sum), product[0]), product[1]));
    }
  }
}

void int8_tile(const TileLayout& layout, const std::uint8_t* tile, Int8Activations x, int tokens, float* out) {
  std::memset(out, 0, static_cast<std::size_t>(tokens) * kTileRows * sizeof(float));
  using Kernel = void (*)(const TileLayout&, const std::uint8_t*, Int8Activations, float*);
  static constexpr int kWidths[] = {12, 8, 4, 2, 1};
  static constexpr Kernel kKernels[3][5] = {
      {two_bit_int8<12>, two_bit_int8<8>, two_bit_int8<4>, two_bit_int8<2>, two_bit_int8<1>},
      {three_bit_int8<12>, three_bit_int8<8>, three_bit_int8<4>, three_bit_int8<2>, three_bit_int8<1>},
      {nullptr, nullptr, normal_float_int8<4>, normal_float_int8<2>, normal_float_int8<1>}};
  const Kernel* kernels = kKernels[static_cast<int>(layout.coding)];
  for (int token = 0, width = 0; token < tokens;) {
    while (kWidths[width] > tokens - token || kernels[width] == nullptr) ++width;
    kernels[width](layout, tile, x.from(token), out + token * kTileRows);
    token += kWidths[width];
  }
}

inline __m512 float_table(const float levels[8]) { return _mm512_broadcast_f32x8(_mm256_loadu_ps(levels)); }

// Multiplies 16 columns: in each of the 32-bit lanes, the code of column 4f + b lies at bit 8b + 2f.  `weights` turns
// the lane's low bits, shifted down, into 16 weights; they are applied to the tokens at `values`.
template <int kTokens, int kParts, typename Weights>
inline void multiply_columns(Weights weights, const float* values, std::int64_t stride,
                             __m512 (&sums)[kTokens][kParts][kVectors]) {
  BDK_UNROLL
  for (int byte = 0; byte < 4; ++byte) BDK_UNROLL
  for (int field = 0; field < kFields; ++field) {
    __m512 w[kVectors];
    BDK_UNROLL
    for (int v = 0; v < kVectors; ++v) w[v] = weights(v, byte, field);
    BDK_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      const __m512 one = _mm512_set1_ps(values[t * stride + 4 * field + byte]);
      BDK_UNROLL
      for (int v = 0; v < kVectors; ++v)
        sums[t][field % kParts][v] = _mm512_fmadd_ps(w[v], one, sums[t][field % kParts][v]);
    }
  }
}

template <int kTokens, Coding kCoding>
void fp32_columns(const TileLayout& layout, const std::uint8_t* at, FloatActivations x, float* out) {
  constexpr int kParts = 2;  // for any number of tokens, so that no token's rounding depends on those beside it
  constexpr bool kSigned = kCoding == Coding::kNormalFloat;
  const __m512 table = float_table(layout.float_levels);
  const __m512i low_mask = _mm512_set1_epi32(3);
  const float* values = x.values;
  for (std::int32_t group = 0; group < layout.groups; ++group) {
    const std::uint8_t* header = at;
    at += layout.header_bytes;
    __m512 scales[2][kVectors];
    BDK_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      scales[0][v] = _mm512_mul_ps(load_scales(layout, header, v * kLanes), _mm512_set1_ps(layout.float_factor));
      scales[1][v] = kSigned ? load_scales(layout, header, kTileRows + v * kLanes) : _mm512_setzero_ps();
    }
    __m512 sums[kTokens][kParts][kVectors];
    BDK_UNROLL
    for (int t = 0; t < kTokens; ++t) BDK_UNROLL
    for (int part = 0; part < kParts; ++part) BDK_UNROLL
    for (int v = 0; v < kVectors; ++v) sums[t][part][v] = _mm512_setzero_ps();
    for (std::int32_t step = layout.steps_of(group); step > 0; --step) {
      if (kTokens == 1) prefetch_step(at, layout.step_bytes);
      if constexpr (kCoding == Coding::kTwoBit) {
        __m512i low[kVectors] = {load(at), load(at + 64)};
        multiply_columns<kTokens, kParts>(
            [&](int v, int byte, int field) {
              return _mm512_permutexvar_ps(_mm512_srli_epi32(low[v], 8 * byte + 2 * field), table);
            },
            values, x.stride, sums);
        values += 16;
      } else {
        const __m512i high[kVectors] = {load(at + 2 * kPlaneBytes), load(at + 2 * kPlaneBytes + 64)};
        BDK_UNROLL
        for (int half = 0; half < 2; ++half) {
          const __m512i low[kVectors] = {load(at + half * kPlaneBytes), load(at + half * kPlaneBytes + 64)};
          multiply_columns<kTokens, kParts>(
              [&](int v, int byte, int field) {
                const int place = 8 * byte + 4 * half + field - 2;
                const __m512i third =
                    place < 0 ? _mm512_slli_epi32(high[v], -place) : _mm512_srli_epi32(high[v], place);
                const __m512i two = _mm512_srli_epi32(low[v], 8 * byte + 2 * field);
                const __m512i code = _mm512_ternarylogic_epi32(low_mask, two, third, 0xCA);  // mask ? two : third
                const __m512 level = _mm512_permutexvar_ps(code, table);
                if constexpr (!kSigned) return level;
                const __mmask16 negative = _mm512_movepi32_mask(_mm512_castps_si512(level));
                return _mm512_mul_ps(level, _mm512_mask_blend_ps(negative, scales[0][v], scales[1][v]));
              },
              values, x.stride, sums);
          values += 16;
        }
      }
      at += layout.step_bytes;
    }
    BDK_UNROLL
    for (int t = 0; t < kTokens; ++t) BDK_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      __m512 sum = sums[t][0][v];
      BDK_UNROLL
      for (int part = 1; part < kParts; ++part) sum = _mm512_add_ps(sum, sums[t][part][v]);
      if (layout.zeros_offset) {
        const __m512 zeros = _mm512_cvtepi32_ps(load_zeros(layout, header, v * kLanes));
        sum = _mm512_fmadd_ps(_mm512_sub_ps(_mm512_set1_ps(layout.float_center), zeros),
                              _mm512_set1_ps(x.sums[t * x.sums_stride + group]), sum);
      }
      float* total = out + t * kTileRows + v * kLanes;
      const __m512 before = _mm512_load_ps(total);
      _mm512_store_ps(total, kSigned ? _mm512_add_ps(before, sum) : _mm512_fmadd_ps(scales[0][v], sum, before));
    }
  }
}

void float_tile(const TileLayout& layout, const std::uint8_t* tile, FloatActivations x, int tokens, float* out) {
  std::memset(out, 0, static_cast<std::size_t>(tokens) * kTileRows * sizeof(float));
  using Kernel = void (*)(const TileLayout&, const std::uint8_t*, FloatActivations, float*);
  static constexpr int kWidths[] = {6, 4, 2, 1};
  static constexpr Kernel kKernels[3][4] = {
      {fp32_columns<6, Coding::kTwoBit>, fp32_columns<4, Coding::kTwoBit>, fp32_columns<2, Coding::kTwoBit>,
       fp32_columns<1, Coding::kTwoBit>},
      {fp32_columns<6, Coding::kThreeBit>, fp32_columns<4, Coding::kThreeBit>, fp32_columns<2, Coding::kThreeBit>,
       fp32_columns<1, Coding::kThreeBit>},
      {fp32_columns<6, Coding::kNormalFloat>, fp32_columns<4, Coding::kNormalFloat>,
       fp32_columns<2, Coding::kNormalFloat>, fp32_columns<1, Coding::kNormalFloat>}};
  const Kernel* kernels = kKernels[static_cast<int>(layout.coding)];
  for (int token = 0, width = 0; token < tokens;) {
    while (kWidths[width] > tokens - token) ++width;
    kernels[width](layout, tile, x.from(token), out + token * kTileRows);
    token += kWidths[width];
  }
}

}  // namespace

const InstructionSet kAvx512Vnni = {"avx512-vnni", quantize_token, stage_token, int8_tile, float_tile};

}  // namespace bdk
