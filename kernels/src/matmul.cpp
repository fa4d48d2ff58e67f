// One product: activations are staged once, then each thread walks its own contiguous range of weight tiles.
#include "matmul.h"

#include "aligned.h"
#include "dispatch.h"
#include "thread_pool.h"

namespace bdk {
namespace {

constexpr std::int64_t kBlockTokens = 256;  // staged at a time: bounds the scratch memory of a long prompt
constexpr int kTileTokens = 24;             // multiplied with one tile at a time

std::int64_t round_up(std::int64_t value, std::int64_t to) { return (value + to - 1) / to * to; }

// Scratch for one block of tokens, laid out as: values, sums, one scale per token.
template <typename Value, typename Sum>
struct Staged {
  Activations<Value, Sum> activations;
  Value* values;
  Sum* sums;
  float* scales;

  // False where memory is short.
  bool reserve(const TileLayout& layout, std::int64_t tokens) {
    static thread_local Scratch scratch;
    const std::int64_t per_line = kAlignment / static_cast<std::int64_t>(sizeof(Value));
    const std::int64_t stride = round_up(layout.padded_columns(), per_line);
    const std::int64_t value_bytes = tokens * stride * static_cast<std::int64_t>(sizeof(Value));
    const std::int64_t sum_bytes =
        round_up(tokens * layout.groups * static_cast<std::int64_t>(sizeof(Sum)), kAlignment);
    const std::int64_t scale_bytes = tokens * static_cast<std::int64_t>(sizeof(float));
    std::uint8_t* memory = scratch.reserve(static_cast<std::size_t>(value_bytes + sum_bytes + scale_bytes));
    if (memory == nullptr) return false;
    values = reinterpret_cast<Value*>(memory);
    sums = reinterpret_cast<Sum*>(memory + value_bytes);
    scales = reinterpret_cast<float*>(memory + value_bytes + sum_bytes);
    activations = {values, stride, sums, layout.groups};
    return true;
  }
};

// Writes the rows that exist of one tile: y = sum * token scale + bias.
void write_rows(const float* sums, int tokens, const float* scales, const float* bias, std::int64_t rows,
                std::int64_t stride, float* y) {
  for (int token = 0; token < tokens; ++token) {
    const float scale = scales == nullptr ? 1.0f : scales[token];
    const float* from = sums + token * kTileRows;
    float* to = y + token * stride;
    for (std::int64_t row = 0; row < rows; ++row) to[row] = from[row] * scale + (bias == nullptr ? 0.0f : bias[row]);
  }
}

template <typename Value, typename Sum, typename Tile>
void multiply_tiles(const bdk_weight& weight, Tile tile_kernel, const Staged<Value, Sum>& staged, std::int64_t tokens,
                    const float* scales, const float* bias, float* y) {
  const std::int64_t work = weight.rows * weight.layout.columns * tokens;
  parallel(weight.tiles, work, [&](std::int64_t begin, std::int64_t end) {
    alignas(kAlignment) float sums[kTileTokens * kTileRows];
    for (std::int64_t tile = begin; tile < end; ++tile) {
      const std::int64_t first_row = tile * kTileRows;
      const std::int64_t rows = weight.rows - first_row < kTileRows ? weight.rows - first_row : kTileRows;
      for (std::int64_t token = 0; token < tokens; token += kTileTokens) {
        const int here = static_cast<int>(tokens - token < kTileTokens ? tokens - token : kTileTokens);
        tile_kernel(weight.layout, weight.tile(tile), staged.activations.from(token), here, sums);
        write_rows(sums, here, scales == nullptr ? nullptr : scales + token,
                   bias == nullptr ? nullptr : bias + first_row, rows, weight.rows,
                   y + token * weight.rows + first_row);
      }
    }
  });
}

template <typename Value, typename Sum, typename Stage, typename Tile>
int multiply(const bdk_weight& weight, const float* x, std::int64_t tokens, const float* bias, float* y, Stage stage,
             Tile tile_kernel, bool scaled) {
  const TileLayout& layout = weight.layout;
  for (std::int64_t first = 0; first < tokens; first += kBlockTokens) {
    const std::int64_t here = tokens - first < kBlockTokens ? tokens - first : kBlockTokens;
    Staged<Value, Sum> staged;
    if (!staged.reserve(layout, here)) return BDK_NO_MEMORY;
    parallel(here, here * layout.columns, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t token = begin; token < end; ++token) stage(staged, token, x + (first + token) * layout.columns);
    });
    multiply_tiles(weight, tile_kernel, staged, here, scaled ? staged.scales : nullptr, bias, y + first * weight.rows);
  }
  return BDK_OK;
}

}  // namespace

int multiply_fp32(const bdk_weight& weight, const float* x, std::int64_t tokens, const float* bias, float* y) {
  const InstructionSet& set = *instruction_set(chosen_instruction_set());
  const auto stage = [&](const Staged<float, float>& staged, std::int64_t token, const float* from) {
    set.stage_token(weight.layout, from, staged.values + token * staged.activations.stride,
                    staged.sums + token * weight.layout.groups);
  };
  return multiply<float, float>(weight, x, tokens, bias, y, stage, set.float_tile, false);
}

int multiply_int8(const bdk_weight& weight, const float* x, std::int64_t tokens, const float* bias, float* y) {
  const InstructionSet& set = *instruction_set(chosen_instruction_set());
  const auto stage = [&](const Staged<std::int8_t, std::int32_t>& staged, std::int64_t token, const float* from) {
    staged.scales[token] = set.quantize_token(weight.layout, from, staged.values + token * staged.activations.stride,
                                              staged.sums + token * weight.layout.groups);
  };
  return multiply<std::int8_t, std::int32_t>(weight, x, tokens, bias, y, stage, set.int8_tile, true);
}

}  // namespace bdk
