// What an instruction set implements for the decoder: all that lies between the packed products, in fp32.
//
// Sums run in an order that depends on sizes alone, never on the tokens beside: a token's numbers are the same bits
// whatever shares its batch and however its prompt is cut.
#pragma once

#include <cstdint>

#include "bitdistill_decoder.h"

namespace bdk {

constexpr int kKeyBlock = 16;       // positions whose keys lie side by side
constexpr int kAttentionRows = 4;   // query rows that `attend` takes at a time
constexpr int kHeadAlignment = 16;  // a value's length in the cache is a multiple of it

// A matrix that is not packed: [rows, columns], row-major.
struct DenseMatrix {
  const void* values;
  bdk_value_type type;
  std::int64_t rows;
  std::int64_t columns;
};

// The cache of one key-value head of one sequence in one layer.  Keys lie in blocks of kKeyBlock positions,
// [head_size][kKeyBlock] each, so that a vector holds one number of 16 keys and no sum runs across lanes; values lie
// in rows.  int8 has one scale for each key and for each value.
struct CachedHead {
  bdk_cache_type type;
  std::int64_t head_size;
  std::int64_t value_stride;
  void* keys;
  void* values;
  float* key_scales;
  float* value_scales;
};

// Up to kAttentionRows query rows over the same keys; row r sees the positions from begin[r] up to end[r].
struct AttentionTile {
  CachedHead cache;
  int rows;
  const float* query[kAttentionRows];
  float* out[kAttentionRows];
  std::int64_t begin[kAttentionRows];
  std::int64_t end[kAttentionRows];
  float scale;
  float* scores;  // kAttentionRows rows of scores_stride, a multiple of kKeyBlock
  std::int64_t scores_stride;
};

struct VectorOps {
  // out = x / sqrt(mean(x^2) + eps) * gain; out may be x.
  void (*rms_norm)(const float* x, const float* gain, std::int64_t size, float eps, float* out);
  void (*add)(float* to, const float* x, std::int64_t size);
  // gate = activation(gate) * up
  void (*gate)(bdk_activation activation, float* gate, const float* up, std::int64_t size);
  // Rotates the pairs (i, i + half) of a head by the angles whose cosines and sines are given.
  void (*rotate)(float* head, const float* cosine, const float* sine, std::int64_t half);
  // x = cap * tanh(x / cap)
  void (*soft_cap)(float* x, std::int64_t size, float cap);
  // out = from * factor
  void (*widen)(bdk_value_type type, const void* from, std::int64_t size, float factor, float* out);
  // Rows `first` to `end` of y [tokens, rows] = x [tokens, columns] W^T + bias (or null).
  void (*dense_rows)(const DenseMatrix& weight, const float* x, std::int64_t tokens, const float* bias,
                     std::int64_t first, std::int64_t end, float* y);
  // Writes a key and a value at a position.
  void (*append)(const CachedHead& cache, std::int64_t position, const float* key, const float* value);
  void (*attend)(const AttentionTile& tile);
};

// Those of the instruction set that runs now.
const VectorOps& vector_ops();

extern const VectorOps kScalarOps;
#if defined(BDK_X86)
extern const VectorOps kAvx2Ops;
extern const VectorOps kAvx512Ops;
#elif defined(BDK_NEON)
extern const VectorOps kNeonOps;
#endif

}  // namespace bdk
