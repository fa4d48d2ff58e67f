// AVX2 with FMA: a step's 32 rows are four vectors, one lane per row.
//
// int8: vpmaddubsw multiplies unsigned codes by signed activations and adds pairs in int16, which saturates, so sums
// widen to int32 every 16 columns, while they are certain to fit: at most 4 * 2*3*128 = 3,072 for 2-bit codes and
// 4 * 2*7*128 = 7,168 for 3-bit ones.  NF3's byte levels (up to 243) would overflow a single pair; each is looked up as
// two halves of at most 122 (2*122*128 = 31,232). fp32: vpermps on the low three bits of each lane decodes 8 weights;
// no masking is needed. One token keeps all four vectors in flight; more tokens go through the tile one vector at a
// time, so that the codes and the sums of up to eight tokens stay in registers.
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

constexpr int kLanes = 8;
constexpr int kVectorBytes = 32;
constexpr int kFields = 4;
constexpr int kPrefetchBytes = 8192;

inline __m256i load(const std::uint8_t* at) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(at)); }

inline __m256i broadcast4(const std::int8_t* x) {
  std::int32_t four;
  std::memcpy(&four, x, sizeof four);
  return _mm256_set1_epi32(four);
}

inline __m256 load_scales(const TileLayout& layout, const std::uint8_t* header, int first) {
  if (layout.fp32_scales) return _mm256_load_ps(reinterpret_cast<const float*>(header) + first);
  return _mm256_cvtph_ps(_mm_load_si128(reinterpret_cast<const __m128i*>(header + first * 2)));
}

inline __m256i load_zeros(const TileLayout& layout, const std::uint8_t* header, int first) {
  if (!layout.zeros_offset) return _mm256_set1_epi32(layout.fixed_zero);
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(header + layout.zeros_offset + first)));
}

inline void prefetch_step(const std::uint8_t* at, int bytes) {
  for (int line = 0; line < bytes; line += 64)
    _mm_prefetch(reinterpret_cast<const char*>(at + kPrefetchBytes + line), _MM_HINT_T0);
}

inline __m256i two_bit_codes(__m256i low, int field) {
  return _mm256_and_si256(_mm256_srli_epi32(low, 2 * field), _mm256_set1_epi8(3));
}

inline __m256i three_bit_codes(__m256i low, __m256i high, int half, int field) {
  const int place = 4 * half + field;  // of the third bit; it belongs at bit 2
  const __m256i third = place < 2 ? _mm256_slli_epi32(high, 2 - place) : _mm256_srli_epi32(high, place - 2);
  return _mm256_or_si256(two_bit_codes(low, field), _mm256_and_si256(third, _mm256_set1_epi8(4)));
}

inline __m256i widen_add(__m256i sum, __m256i pairs) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

inline void flush_affine(const TileLayout& layout, const std::uint8_t* header, int first, __m256i dot,
                         std::int32_t x_sum, float* out) {
  const __m256i zeros = load_zeros(layout, header, first);
  const __m256i shifted = _mm256_sll_epi32(dot, _mm_cvtsi32_si128(layout.code_shift));
  const __m256i value = _mm256_sub_epi32(shifted, _mm256_mullo_epi32(zeros, _mm256_set1_epi32(x_sum)));
  const __m256 step = _mm256_mul_ps(load_scales(layout, header, first), _mm256_set1_ps(layout.integer_factor));
  _mm256_store_ps(out + first,
                  _mm256_add_ps(_mm256_load_ps(out + first), _mm256_mul_ps(step, _mm256_cvtepi32_ps(value))));
}

// Two- and three-bit affine codes: kVectors vectors of rows from row `first` on.
template <int kTokens, int kVectors, bool kThird>
void affine_int8(const TileLayout& layout, const std::uint8_t* at, int first, Int8Activations x, float* out) {
  constexpr int kHalves = kThird ? 2 : 1;
  const std::int8_t* values = x.values;
  for (std::int32_t group = 0; group < layout.groups; ++group) {
    const std::uint8_t* header = at;
    at += layout.header_bytes;
    __m256i dot[kTokens][kVectors];
    BDK_UNROLL
    for (int t = 0; t < kTokens; ++t) BDK_UNROLL
    for (int v = 0; v < kVectors; ++v) dot[t][v] = _mm256_setzero_si256();
    for (std::int32_t step = layout.steps_of(group); step > 0; --step) {
      if (kTokens == 1) prefetch_step(at, layout.step_bytes);
      BDK_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        const std::uint8_t* rows = at + first * 4 + v * kVectorBytes;
        BDK_UNROLL
        for (int half = 0; half < kHalves; ++half) {
          const __m256i low = load(rows + half * kPlaneBytes);
          __m256i codes[kFields];
          BDK_UNROLL
          for (int field = 0; field < kFields; ++field)
            codes[field] =
                kThird ? three_bit_codes(low, load(rows + 2 * kPlaneBytes), half, field) : two_bit_codes(low, field);
          BDK_UNROLL
          for (int t = 0; t < kTokens; ++t) {
            const std::int8_t* token = values + t * x.stride + 16 * half;
            __m256i pairs = _mm256_maddubs_epi16(codes[0], broadcast4(token));
            BDK_UNROLL
            for (int field = 1; field < kFields; ++field)
              pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(codes[field], broadcast4(token + 4 * field)));
            dot[t][v] = widen_add(dot[t][v], pairs);
          }
        }
      }
      at += layout.step_bytes;
      values += layout.step_columns;
    }
    BDK_UNROLL
    for (int t = 0; t < kTokens; ++t) BDK_UNROLL
    for (int v = 0; v < kVectors; ++v)
      flush_affine(layout, header, first + v * kLanes, dot[t][v], x.sums[t * x.sums_stride + group],
                   out + t * kTileRows);
  }
}

// A byte table of eight levels, halved: rounded up or down, so that the two halves add up to the level.
inline __m256i half_table(const std::uint8_t levels[8], int round_up) {
  std::uint8_t halves[8];
  for (int code = 0; code < 8; ++code) halves[code] = static_cast<std::uint8_t>((levels[code] + round_up) / 2);
  std::int64_t eight;
  std::memcpy(&eight, halves, sizeof eight);
  return _mm256_set1_epi64x(eight);
}

template <int kTokens>
void normal_float_int8(const TileLayout& layout, const std::uint8_t* at, int first, Int8Activations x, float* out) {
  const __m256i tables[2][2] = {{half_table(layout.positive_levels, 0), half_table(layout.positive_levels, 1)},
                                {half_table(layout.negative_levels, 0), half_table(layout.negative_levels, 1)}};
  const std::int8_t* values = x.values;
  for (std::int32_t group = 0; group < layout.groups; ++group) {
    const std::uint8_t* header = at;
    at += layout.header_bytes;
    __m256i dot[kTokens][2];
    BDK_UNROLL
    for (int t = 0; t < kTokens; ++t) dot[t][0] = dot[t][1] = _mm256_setzero_si256();
    for (std::int32_t step = layout.steps_of(group); step > 0; --step) {
      const std::uint8_t* rows = at + first * 4;
      const __m256i high = load(rows + 2 * kPlaneBytes);
      BDK_UNROLL
      for (int half = 0; half < 2; ++half) {
        const __m256i low = load(rows + half * kPlaneBytes);
        BDK_UNROLL
        for (int field = 0; field < kFields; ++field) {
          const __m256i codes = three_bit_codes(low, high, half, field);
          BDK_UNROLL
          for (int sign = 0; sign < 2; ++sign) {
            const __m256i levels[2] = {_mm256_shuffle_epi8(tables[sign][0], codes),
                                       _mm256_shuffle_epi8(tables[sign][1], codes)};
            BDK_UNROLL
            for (int t = 0; t < kTokens; ++t) {
              const __m256i four = broadcast4(values + t * x.stride + 16 * half + 4 * field);
              dot[t][sign] = widen_add(dot[t][sign], _mm256_maddubs_epi16(levels[0], four));
              dot[t][sign] = widen_add(dot[t][sign], _mm256_maddubs_epi16(levels[1], four));
            }
          }
        }
      }
      at += layout.step_bytes;
      values += layout.step_columns;
    }
    BDK_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      const __m256 positive = _mm256_mul_ps(load_scales(layout, header, first), _mm256_set1_ps(layout.positive_factor));
      const __m256 negative =
          _mm256_mul_ps(load_scales(layout, header, kTileRows + first), _mm256_set1_ps(layout.negative_factor));
      float* sum = out + t * kTileRows + first;
      const __m256 more = _mm256_add_ps(_mm256_load_ps(sum), _mm256_mul_ps(positive, _mm256_cvtepi32_ps(dot[t][0])));
      _mm256_store_ps(sum, _mm256_sub_ps(more, _mm256_mul_ps(negative, _mm256_cvtepi32_ps(dot[t][1]))));
    }
  }
}

template <int kTokens, Coding kCoding>
void int8_rows(const TileLayout& layout, const std::uint8_t* tile, Int8Activations x, float* out) {
  constexpr bool kThird = kCoding == Coding::kThreeBit;
  if constexpr (kCoding == Coding::kNormalFloat) {
    for (int first = 0; first < kTileRows; first += kLanes) normal_float_int8<kTokens>(layout, tile, first, x, out);
  } else if constexpr (kTokens == 1) {
    affine_int8<1, kTileRows / kLanes, kThird>(layout, tile, 0, x, out);
  } else {
    for (int first = 0; first < kTileRows; first += kLanes)
      affine_int8<kTokens, 1, kThird>(layout, tile, first, x, out);
  }
}

template <int kTokens, int kVectors, Coding kCoding>
void fp32_vectors(const TileLayout& layout, const std::uint8_t* at, int first, FloatActivations x, float* out) {
  constexpr bool kSigned = kCoding == Coding::kNormalFloat;
  constexpr int kHalves = kCoding == Coding::kTwoBit ? 1 : 2;
  const __m256 table = _mm256_loadu_ps(layout.float_levels);
  const __m256i low_mask = _mm256_set1_epi32(3);
  const float* values = x.values;
  for (std::int32_t group = 0; group < layout.groups; ++group) {
    const std::uint8_t* header = at;
    at += layout.header_bytes;
    __m256 scales[2][kVectors];
    __m256 sums[kTokens][kVectors];
    BDK_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const int row = first + v * kLanes;
      scales[0][v] = _mm256_mul_ps(load_scales(layout, header, row), _mm256_set1_ps(layout.float_factor));
      scales[1][v] = kSigned ? load_scales(layout, header, kTileRows + row) : _mm256_setzero_ps();
      BDK_UNROLL
      for (int t = 0; t < kTokens; ++t) sums[t][v] = _mm256_setzero_ps();
    }
    for (std::int32_t step = layout.steps_of(group); step > 0; --step) {
      if (kTokens == 1) prefetch_step(at, layout.step_bytes);
      const std::uint8_t* rows = at + first * 4;
      for (int half = 0; half < kHalves; ++half) {
        __m256i low[kVectors], high[kVectors];
        BDK_UNROLL
        for (int v = 0; v < kVectors; ++v) {
          low[v] = load(rows + half * kPlaneBytes + v * kVectorBytes);
          high[v] = kHalves == 1 ? _mm256_setzero_si256() : load(rows + 2 * kPlaneBytes + v * kVectorBytes);
          high[v] = _mm256_srli_epi32(high[v], 4 * half);
        }
        BDK_UNROLL
        for (int byte = 0; byte < 4; ++byte) BDK_UNROLL
        for (int field = 0; field < kFields; ++field) {
          const int place = 8 * byte + field - 2;  // of the third bit, less the two below it
          BDK_UNROLL
          for (int v = 0; v < kVectors; ++v) {
            __m256i code = _mm256_srli_epi32(low[v], 8 * byte + 2 * field);
            if (kHalves == 2) {
              const __m256i third = place < 0 ? _mm256_slli_epi32(high[v], -place) : _mm256_srli_epi32(high[v], place);
              code = _mm256_or_si256(_mm256_and_si256(low_mask, code), _mm256_andnot_si256(low_mask, third));
            }
            __m256 weight = _mm256_permutevar8x32_ps(table, code);
            if (kSigned) weight = _mm256_mul_ps(weight, _mm256_blendv_ps(scales[0][v], scales[1][v], weight));
            BDK_UNROLL
            for (int t = 0; t < kTokens; ++t)
              sums[t][v] = _mm256_fmadd_ps(weight, _mm256_set1_ps(values[t * x.stride + 4 * field + byte]), sums[t][v]);
          }
        }
        values += 16;
      }
      at += layout.step_bytes;
    }
    BDK_UNROLL
    for (int t = 0; t < kTokens; ++t) BDK_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const int row = first + v * kLanes;
      __m256 sum = sums[t][v];
      if (layout.zeros_offset) {
        const __m256 zeros = _mm256_cvtepi32_ps(load_zeros(layout, header, row));
        sum = _mm256_fmadd_ps(_mm256_sub_ps(_mm256_set1_ps(layout.float_center), zeros),
                              _mm256_set1_ps(x.sums[t * x.sums_stride + group]), sum);
      }
      float* total = out + t * kTileRows + row;
      const __m256 before = _mm256_load_ps(total);
      _mm256_store_ps(total, kSigned ? _mm256_add_ps(before, sum) : _mm256_fmadd_ps(scales[0][v], sum, before));
    }
  }
}

template <int kTokens, Coding kCoding>
void fp32_rows(const TileLayout& layout, const std::uint8_t* tile, FloatActivations x, float* out) {
  constexpr int kVectors = kTokens == 1 ? kTileRows / kLanes : 1;
  for (int first = 0; first < kTileRows; first += kVectors * kLanes)
    fp32_vectors<kTokens, kVectors, kCoding>(layout, tile, first, x, out);
}

constexpr int kWidths[] = {8, 4, 2, 1};

void int8_tile(const TileLayout& layout, const std::uint8_t* tile, Int8Activations x, int tokens, float* out) {
  std::memset(out, 0, static_cast<std::size_t>(tokens) * kTileRows * sizeof(float));
  using Kernel = void (*)(const TileLayout&, const std::uint8_t*, Int8Activations, float*);
  static constexpr Kernel kKernels[3][4] = {{int8_rows<8, Coding::kTwoBit>, int8_rows<4, Coding::kTwoBit>,
                                             int8_rows<2, Coding::kTwoBit>, int8_rows<1, Coding::kTwoBit>},
                                            {int8_rows<8, Coding::kThreeBit>, int8_rows<4, Coding::kThreeBit>,
                                             int8_rows<2, Coding::kThreeBit>, int8_rows<1, Coding::kThreeBit>},
                                            {nullptr, int8_rows<4, Coding::kNormalFloat>,
                                             int8_rows<2, Coding::kNormalFloat>, int8_rows<1, Coding::kNormalFloat>}};
  const Kernel* kernels = kKernels[static_cast<int>(layout.coding)];
  for (int token = 0, width = 0; token < tokens;) {
    while (kWidths[width] > tokens - token || kernels[width] == nullptr) ++width;
    kernels[width](layout, tile, x.from(token), out + token * kTileRows);
    token += kWidths[width];
  }
}

void float_tile(const TileLayout& layout, const std::uint8_t* tile, FloatActivations x, int tokens, float* out) {
  std::memset(out, 0, static_cast<std::size_t>(tokens) * kTileRows * sizeof(float));
  using Kernel = void (*)(const TileLayout&, const std::uint8_t*, FloatActivations, float*);
  static constexpr Kernel kKernels[3][4] = {{fp32_rows<8, Coding::kTwoBit>, fp32_rows<4, Coding::kTwoBit>,
                                             fp32_rows<2, Coding::kTwoBit>, fp32_rows<1, Coding::kTwoBit>},
                                            {fp32_rows<8, Coding::kThreeBit>, fp32_rows<4, Coding::kThreeBit>,
                                             fp32_rows<2, Coding::kThreeBit>, fp32_rows<1, Coding::kThreeBit>},
                                            {fp32_rows<8, Coding::kNormalFloat>, fp32_rows<4, Coding::kNormalFloat>,
                                             fp32_rows<2, Coding::kNormalFloat>, fp32_rows<1, Coding::kNormalFloat>}};
  const Kernel* kernels = kKernels[static_cast<int>(layout.coding)];
  for (int token = 0, width = 0; token < tokens;) {
    while (kWidths[width] > tokens - token) ++width;
    kernels[width](layout, tile, x.from(token), out + token * kTileRows);
    token += kWidths[width];
  }
}

}  // namespace

const InstructionSet kAvx2 = {"avx2", quantize_token, stage_token, int8_tile, float_tile};

}  // namespace bdk
