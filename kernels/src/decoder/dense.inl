// Products with matrices in 16 or 32 bits.  One token is bound by memory: a row is one stream, read in whole lines,
// into four chains of sums.  A large first cache is asked ahead of time; with a smaller one the processor's own
// prefetcher does better alone (asking halved the speed on Zen 4).  More tokens share each load of weights; every
// product has the same four chains, so its bits do not depend on how many.
#pragma once

#include "caches.h"
#include "vector_math.inl"
#include "vector_ops.h"

namespace bdk {
namespace {

constexpr int kTokenBlock = 48;            // whose inputs stay in the second-level cache while all rows pass
constexpr bool kWide = Vec::kLanes == 16;  // 32 registers

// How values of one stored type are read.
struct Fp32Values {
  using Stored = float;
  static Vec read(const Stored* at) { return load(at); }
  static void read_pair(const Stored* at, Vec* pair) {
    pair[0] = load(at);
    pair[1] = load(at + Vec::kLanes);
  }
};
struct Fp16Values {
  using Stored = std::uint16_t;
  static Vec read(const Stored* at) { return load_half(at); }
  static void read_pair(const Stored* at, Vec* pair) { load_halves(at, pair); }
};
struct Bf16Values {
  using Stored = std::uint16_t;
  static Vec read(const Stored* at) { return load_bfloat(at); }
  static void read_pair(const Stored* at, Vec* pair) { load_bfloats(at, pair); }
};

template <typename Values>
inline Vec read(const typename Values::Stored* at, int count) {
  if (count == Vec::kLanes) return Values::read(at);
  typename Values::Stored some[Vec::kLanes] = {};
  for (int lane = 0; lane < count; ++lane) some[lane] = at[lane];
  return Values::read(some);
}

template <typename Values>
void widen_values(const void* from, std::int64_t size, float factor, float* out) {
  const auto* values = static_cast<const typename Values::Stored*>(from);
  for_vectors(size, [&](std::int64_t at, int count) {
    store(out + at, mul(read<Values>(values + at, count), broadcast(factor)), count);
  });
}

void widen(bdk_value_type type, const void* from, std::int64_t size, float factor, float* out) {
  if (type == BDK_VALUE_FP16) return widen_values<Fp16Values>(from, size, factor, out);
  if (type == BDK_VALUE_BF16) return widen_values<Bf16Values>(from, size, factor, out);
  widen_values<Fp32Values>(from, size, factor, out);
}

// y [kTokens, stride] at `kRows` rows from `row` on.
template <typename Values, int kRows, int kTokens>
void dense_tile(const typename Values::Stored* weight, std::int64_t columns, const float* x, const float* bias,
                std::int64_t stride, float* y) {
  Vec sums[kRows][kTokens][kChains];
  BDK_UNROLL
  for (int r = 0; r < kRows; ++r) BDK_UNROLL
  for (int t = 0; t < kTokens; ++t) BDK_UNROLL
  for (int chain = 0; chain < kChains; ++chain) sums[r][t][chain] = zero();
  constexpr std::int64_t kRoundBytes = kChains * Vec::kLanes * sizeof(typename Values::Stored);
  const bool asks = kRows == 1 && has_large_first_cache();
  std::int64_t at = 0;
  for (; at + kChains * Vec::kLanes <= columns; at += kChains * Vec::kLanes) {
    if (asks) {
      BDK_UNROLL
      for (std::int64_t line = 0; line < kRoundBytes; line += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(weight + at) + kLargeCacheAheadBytes + line);
    }
    BDK_UNROLL
    for (int chain = 0; chain < kChains; chain += 2) {
      const std::int64_t here = at + chain * Vec::kLanes;
      Vec values[kRows][2];
      BDK_UNROLL
      for (int r = 0; r < kRows; ++r) Values::read_pair(weight + r * columns + here, values[r]);
      BDK_UNROLL
      for (int t = 0; t < kTokens; ++t) BDK_UNROLL
      for (int half = 0; half < 2; ++half) {
        const Vec given = load(x + t * columns + here + half * Vec::kLanes);
        BDK_UNROLL
        for (int r = 0; r < kRows; ++r)
          sums[r][t][chain + half] = fma(values[r][half], given, sums[r][t][chain + half]);
      }
    }
  }
  for (; at < columns; at += Vec::kLanes) {
    const int count = static_cast<int>(columns - at < Vec::kLanes ? columns - at : Vec::kLanes);
    BDK_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const Vec values = read<Values>(weight + r * columns + at, count);
      BDK_UNROLL
      for (int t = 0; t < kTokens; ++t) sums[r][t][0] = fma(values, load(x + t * columns + at, count), sums[r][t][0]);
    }
  }
  BDK_UNROLL
  for (int r = 0; r < kRows; ++r) BDK_UNROLL
  for (int t = 0; t < kTokens; ++t) {
    const Vec* of = sums[r][t];
    y[t * stride + r] = sum(add(add(of[0], of[1]), add(of[2], of[3]))) + (bias == nullptr ? 0.0f : bias[r]);
  }
}

template <typename Values>
void dense_rows_of(const DenseMatrix& weight, const float* x, std::int64_t tokens, const float* bias,
                   std::int64_t first, std::int64_t end, float* y) {
  using Tile = void (*)(const typename Values::Stored*, std::int64_t, const float*, const float*, std::int64_t, float*);
  static constexpr int kWidths[] = {kWide ? 6 : 2, kWide ? 4 : 2, 2, 1};
  static constexpr Tile kTiles[] = {dense_tile<Values, 1, kWidths[0]>, dense_tile<Values, 1, kWidths[1]>,
                                    dense_tile<Values, 1, 2>, dense_tile<Values, 1, 1>};
  const auto* values = static_cast<const typename Values::Stored*>(weight.values);
  const std::int64_t columns = weight.columns;
  for (std::int64_t block = 0; block < tokens; block += kTokenBlock) {
    const std::int64_t block_end = block + kTokenBlock < tokens ? block + kTokenBlock : tokens;
    for (std::int64_t row = first; row < end;) {
      const float* added = bias == nullptr ? nullptr : bias + row;
      const bool pair = kWide && block_end - block > kWidths[0] && end - row > 1;
      std::int64_t token = block;
      for (; pair && token + 3 <= block_end; token += 3)
        dense_tile<Values, 2, 3>(values + row * columns, columns, x + token * columns, added, weight.rows,
                                 y + token * weight.rows + row);
      for (int width = 0; token < block_end; token += kWidths[width]) {
        while (kWidths[width] > block_end - token) ++width;
        for (int r = 0; r < (pair ? 2 : 1); ++r)
          kTiles[width](values + (row + r) * columns, columns, x + token * columns,
                        added == nullptr ? added : added + r, weight.rows, y + token * weight.rows + row + r);
      }
      row += pair ? 2 : 1;
    }
  }
}

void dense_rows(const DenseMatrix& weight, const float* x, std::int64_t tokens, const float* bias, std::int64_t first,
                std::int64_t end, float* y) {
  if (weight.type == BDK_VALUE_FP16) return dense_rows_of<Fp16Values>(weight, x, tokens, bias, first, end, y);
  if (weight.type == BDK_VALUE_BF16) return dense_rows_of<Bf16Values>(weight, x, tokens, bias, first, end, y);
  dense_rows_of<Fp32Values>(weight, x, tokens, bias, first, end, y);
}

}  // namespace
}  // namespace bdk
