// Attention over the cache, read where it lies: scores, softmax, weighted values, for a few query rows at a time.
#pragma once

#include "vector_math.inl"
#include "vector_ops.h"

namespace bdk {
namespace {

constexpr int kParts = kKeyBlock / Vec::kLanes;  // vectors of a block of keys
constexpr int kPanel = 4;                        // vectors of a value that are summed at a time

struct HalfCache {
  using Stored = std::uint16_t;
  static constexpr bool kScaled = false;
  static Vec read(const Stored* at) { return load_half(at); }
};
struct Int8Cache {
  using Stored = std::int8_t;
  static constexpr bool kScaled = true;
  static Vec read(const Stored* at) { return load_int8(at); }
};

// Products of kRows queries with one block of keys.
template <typename Cache, int kRows>
inline void score_block(const AttentionTile& tile, int row, std::int64_t block, float* scores) {
  const std::int64_t size = tile.cache.head_size;
  const auto* keys = static_cast<const typename Cache::Stored*>(tile.cache.keys) + block * size * kKeyBlock;
  for (int part = 0; part < kParts; ++part) {
    Vec sums[kRows][kChains];
    BDK_UNROLL
    for (int r = 0; r < kRows; ++r) BDK_UNROLL
    for (int chain = 0; chain < kChains; ++chain) sums[r][chain] = zero();
    const auto* at = keys + part * Vec::kLanes;
    std::int64_t c = 0;
    for (; c + kChains <= size; c += kChains) {
      BDK_UNROLL
      for (int chain = 0; chain < kChains; ++chain) {
        const Vec key = Cache::read(at + (c + chain) * kKeyBlock);
        BDK_UNROLL
        for (int r = 0; r < kRows; ++r)
          sums[r][chain] = fma(broadcast(tile.query[row + r][c + chain]), key, sums[r][chain]);
      }
    }
    for (; c < size; ++c) {
      const Vec key = Cache::read(at + c * kKeyBlock);
      BDK_UNROLL
      for (int r = 0; r < kRows; ++r) sums[r][0] = fma(broadcast(tile.query[row + r][c]), key, sums[r][0]);
    }
    Vec factor = broadcast(tile.scale);
    if (Cache::kScaled) factor = mul(factor, load(tile.cache.key_scales + block * kKeyBlock + part * Vec::kLanes));
    BDK_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const Vec dot = add(add(sums[r][0], sums[r][1]), add(sums[r][2], sums[r][3]));
      store(scores + r * tile.scores_stride + part * Vec::kLanes, mul(dot, factor));
    }
  }
}

// Turns `size` scores into e^(score - largest), those outside first..end into 0; returns their sum's inverse.
inline float soften(float* scores, std::int64_t size, std::int64_t first, std::int64_t end) {
  for (std::int64_t at = 0; at < first; ++at) scores[at] = -3e38f;
  for (std::int64_t at = end; at < size; ++at) scores[at] = -3e38f;
  Vec most = broadcast(-3e38f);
  for (std::int64_t at = 0; at < size; at += Vec::kLanes) most = max(most, load(scores + at));
  const Vec peak = broadcast(largest(most));
  for (std::int64_t at = 0; at < size; at += Vec::kLanes) store(scores + at, exponential(sub(load(scores + at), peak)));
  for (std::int64_t at = 0; at < first; ++at) scores[at] = 0.0f;
  for (std::int64_t at = end; at < size; ++at) scores[at] = 0.0f;
  Vec total = zero();
  for (std::int64_t at = 0; at < size; at += Vec::kLanes) total = add(total, load(scores + at));
  return 1.0f / sum(total);
}

// Sums of values, each times its row's weight, for kVectors vectors of the head.
template <typename Cache, int kRows, int kVectors>
inline void sum_values(const AttentionTile& tile, int row, std::int64_t base, std::int64_t first, std::int64_t end,
                       std::int64_t column, const float* inverse) {
  Vec sums[kRows][kVectors];
  BDK_UNROLL
  for (int r = 0; r < kRows; ++r) BDK_UNROLL
  for (int v = 0; v < kVectors; ++v) sums[r][v] = zero();
  const std::int64_t stride = tile.cache.value_stride;
  const auto* values = static_cast<const typename Cache::Stored*>(tile.cache.values) + column;
  const float* weights = tile.scores + row * tile.scores_stride - base;
  for (std::int64_t position = first; position < end; ++position) {
    const auto* at = values + position * stride;
    Vec value[kVectors];
    BDK_UNROLL
    for (int v = 0; v < kVectors; ++v) value[v] = Cache::read(at + v * Vec::kLanes);
    BDK_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const Vec weight = broadcast(weights[r * tile.scores_stride + position]);
      BDK_UNROLL
      for (int v = 0; v < kVectors; ++v) sums[r][v] = fma(weight, value[v], sums[r][v]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      const std::int64_t at = column + v * Vec::kLanes, left = tile.cache.head_size - at;
      const int count = static_cast<int>(left < 0 ? 0 : left < Vec::kLanes ? left : Vec::kLanes);
      store(tile.out[row + r] + at, mul(sums[r][v], broadcast(inverse[r])), count);
    }
  }
}

template <typename Cache, int kRows>
void attend_rows(const AttentionTile& tile, int row) {
  std::int64_t first = tile.begin[row], end = tile.end[row];
  for (int r = 1; r < kRows; ++r) {
    first = tile.begin[row + r] < first ? tile.begin[row + r] : first;
    end = tile.end[row + r] > end ? tile.end[row + r] : end;
  }
  const std::int64_t first_block = first / kKeyBlock, base = first_block * kKeyBlock;
  const std::int64_t blocks = (end - base + kKeyBlock - 1) / kKeyBlock;
  float* scores = tile.scores + row * tile.scores_stride;
  for (std::int64_t block = 0; block < blocks; ++block)
    score_block<Cache, kRows>(tile, row, first_block + block, scores + block * kKeyBlock);
  float inverse[kRows];
  for (int r = 0; r < kRows; ++r) {
    float* of = scores + r * tile.scores_stride;
    inverse[r] = soften(of, blocks * kKeyBlock, tile.begin[row + r] - base, tile.end[row + r] - base);
    if (!Cache::kScaled) continue;
    for (std::int64_t at = 0; at < blocks * kKeyBlock; at += Vec::kLanes)
      store(of + at, mul(load(of + at), load(tile.cache.value_scales + base + at)));
  }
  std::int64_t column = 0;
  for (; column + kPanel * Vec::kLanes <= tile.cache.value_stride; column += kPanel * Vec::kLanes)
    sum_values<Cache, kRows, kPanel>(tile, row, base, first, end, column, inverse);
  for (; column < tile.cache.value_stride; column += Vec::kLanes)
    sum_values<Cache, kRows, 1>(tile, row, base, first, end, column, inverse);
}

// As many rows at a time as registers hold: they share each load of a key or value.
template <typename Cache, int kRows>
void attend_most(const AttentionTile& tile, int row) {
  if constexpr (kRows > 1)
    if (tile.rows - row < kRows) return attend_most<Cache, kRows - 1>(tile, row);
  attend_rows<Cache, kRows>(tile, row);
  if (row + kRows < tile.rows) attend_most<Cache, kRows>(tile, row + kRows);
}

void attend(const AttentionTile& tile) {
  if (tile.cache.type == BDK_CACHE_INT8) return attend_most<Int8Cache, Vec::kMaxRows>(tile, 0);
  attend_most<HalfCache, Vec::kMaxRows>(tile, 0);
}

}  // namespace
}  // namespace bdk
