// What an instruction set implements: staging of activations, and the product of one tile of 32 rows.
#pragma once

#include <cstdint>

#include "caches.h"
#include "layout.h"

namespace bdk {

constexpr int kMostTokens = 144;  // that are multiplied with one tile at a time

// Staged activations.  The columns are padded group by group as the layout is.  Tokens are cut into blocks of nearly
// equal width, at most `widest`, one after the other; inside a block, four columns (int8) or one (fp32) of all its
// tokens stand beside each other, so that a product reads one stream however many tokens it has.
// Where matrices are multiplied (InstructionSet::matrix_tokens) a token stands after the other, `pitch` values apart.
template <typename Value, typename Sum>
struct Activations {
  const Value* values;
  const Sum* sums;            // of every group of every token: [tokens][groups]
  const float* group_scales;  // as many, or null where each token has one scale, which is not applied here
  std::int64_t padded_columns;
  std::int32_t groups;
  std::int32_t tokens;
  std::int32_t widest;
  std::int64_t pitch;  // 0: in blocks

  BDK_INLINE std::int32_t blocks() const { return (tokens + widest - 1) / widest; }
  // The first token of a block; that of the block after the last is `tokens`.
  BDK_INLINE std::int32_t first_token(std::int32_t block) const {
    const std::int32_t count = blocks(), more = tokens % count;
    return tokens / count * block + (block < more ? block : more);
  }
};
using Int8Activations = Activations<std::int8_t, std::int32_t>;
using FloatActivations = Activations<float, float>;

struct InstructionSet {
  const char* name;
  std::int32_t widest_int8;  // tokens of a block
  std::int32_t widest_float;
  // Quantises one token of layout.columns values into padded int8 values and sums.  One scale for the token, or with
  // `grouped` one for each group; NaN where a value that it is for is not finite.
  void (*quantize_token)(const TileLayout& layout, const float* x, bool grouped, std::int8_t* values,
                         std::int32_t* sums, float* scales);
  // Copies one token into padded values and sums.
  void (*stage_token)(const TileLayout& layout, const float* x, float* values, float* sums);
  // out [tokens][32] = activations times the tile's rows, at most kMostTokens.  With int8 activations every group's
  // sum is an exact integer, and float operations happen in one order: all instruction sets give the same bits.
  void (*int8_tile)(const TileLayout& layout, const std::uint8_t* tile, const Int8Activations& x, float* out);
  void (*float_tile)(const TileLayout& layout, const std::uint8_t* tile, const FloatActivations& x, float* out);
  // Reads `bytes` (a multiple of 256, aligned to 64) in one of kReadWays ways; the result depends on all of them.
  std::uint64_t (*read)(const std::uint8_t* memory, std::int64_t bytes, int way);
  // Does rounds * the returned number of int8 multiplications and additions, as fast as it can.
  std::int64_t (*multiply_add)(std::int64_t rounds);
  std::int32_t matrix_tokens = 0;  // from so many on, int8 activations are staged a token after the other; 0: never
};

constexpr int kReadWays = 3;

}  // namespace bdk
