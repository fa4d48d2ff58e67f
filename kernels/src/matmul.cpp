// Activations are staged once, then each thread walks its own contiguous range of weight tiles.
#include "matmul.h"

#include <cstring>

#include "aligned.h"
#include "dispatch.h"
#include "thread_pool.h"
#include "tile.h"

namespace bdk {
namespace {

constexpr std::int64_t kStagingWork = 16;  // a value that is staged costs about as much as so many multiplications

std::int64_t round_up(std::int64_t value, std::int64_t to) { return (value + to - 1) / to * to; }
std::int64_t ceil_div(std::int64_t value, std::int64_t by) { return (value + by - 1) / by; }

bool same_groups(const TileLayout& a, const TileLayout& b) {
  return a.columns == b.columns && a.group_size == b.group_size &&
         a.group_steps * a.step_columns == b.group_steps * b.step_columns &&
         a.last_group_steps * a.step_columns == b.last_group_steps * b.step_columns;
}

// One token after the other becomes a column of a block: `kUnit` values of it beside those of the other tokens.
template <int kUnit, typename Value>
void interleave(const Value* from, std::int64_t columns, std::int32_t width, Value* to) {
  for (std::int64_t column = 0; column < columns; column += kUnit)
    std::memcpy(to + column * width, from + column, kUnit * sizeof(Value));
}

// How an instruction set wants tokens beside each other: see InstructionSet.
struct Widths {
  std::int32_t widest, matrix_tokens;
};

// Scratch for staged tokens: values, sums, scales, and a row for each thread that stages.
template <typename Value, typename Sum, int kUnit>
class Staged {
 public:
  Activations<Value, Sum> activations;
  const float* token_scales = nullptr;  // null where the tile has applied all

  // False where memory is short.
  template <typename Stage>
  bool stage(const TileLayout& layout, const float* x, std::int32_t tokens, const Widths& widths, bool grouped,
             Stage stage_row) {
    static thread_local Scratch scratch;
    const std::int64_t padded = layout.padded_columns();
    const std::int64_t row_bytes = round_up(padded * static_cast<std::int64_t>(sizeof(Value)), kAlignment);
    const std::int64_t sum_bytes = round_up(tokens * layout.groups * std::int64_t{4}, kAlignment);
    const bool apart = widths.matrix_tokens != 0 && tokens >= widths.matrix_tokens;
    const std::int64_t pitch_bytes = row_bytes + (apart ? kAlignment : 0);  // into different sets of a cache
    const std::int64_t value_bytes = pitch_bytes * tokens;
    const std::int64_t pitch = apart ? pitch_bytes / static_cast<std::int64_t>(sizeof(Value)) : 0;
    const bool direct = tokens == 1 || apart;  // a block of one is a row
    std::uint8_t* memory =
        scratch.reserve(static_cast<std::size_t>((direct ? 1 : 2) * value_bytes + 2 * sum_bytes + kAlignment));
    if (memory == nullptr) return false;
    Value* values = reinterpret_cast<Value*>(memory);
    Sum* sums = reinterpret_cast<Sum*>(memory + value_bytes);
    float* scales = reinterpret_cast<float*>(memory + value_bytes + sum_bytes);
    std::uint8_t* rows = memory + value_bytes + 2 * sum_bytes;
    activations = {values, sums, grouped ? scales : nullptr, padded, layout.groups, tokens, widths.widest, pitch};
    token_scales = grouped || sizeof(Value) != 1 ? nullptr : scales;
    parallel(tokens, tokens * layout.columns * kStagingWork, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t token = begin; token < end; ++token) {
        Value* row = direct ? values + token * pitch : reinterpret_cast<Value*>(rows + token * row_bytes);
        stage_row(x + token * layout.columns, row, sums + token * layout.groups,
                  scales + token * (grouped ? layout.groups : 1));
        if (direct) continue;
        std::int32_t block = 0;
        while (activations.first_token(block + 1) <= token) ++block;
        const std::int64_t first = activations.first_token(block);
        const std::int32_t width = static_cast<std::int32_t>(activations.first_token(block + 1) - first);
        interleave<kUnit>(row, padded, width, values + first * padded + (token - first) * kUnit);
      }
    });
    return true;
  }
};

// Writes the rows that exist of one tile: y = sum * token scale + bias.
void write_rows(const float* sums, std::int32_t tokens, const float* scales, const float* bias, std::int64_t rows,
                std::int64_t stride, float* y) {
  for (std::int32_t token = 0; token < tokens; ++token) {
    const float scale = scales == nullptr ? 1.0f : scales[token];
    const float* from = sums + token * kTileRows;
    float* to = y + token * stride;
    for (std::int64_t row = 0; row < rows; ++row) to[row] = from[row] * scale + (bias == nullptr ? 0.0f : bias[row]);
  }
}

// Multiplies tiles [begin, end) of all products, counted through.
template <typename Tile, typename StagedT>
void multiply_tiles(const bdk_product* products, std::int64_t begin, std::int64_t end, Tile tile_kernel,
                    const StagedT& staged, std::int64_t first_token) {
  alignas(kAlignment) float sums[kMostTokens * kTileRows];
  for (std::int64_t before = 0; begin < end; before += products->weight->tiles, ++products) {
    const bdk_weight& weight = *products->weight;
    for (; begin < end && begin < before + weight.tiles; ++begin) {
      const std::int64_t tile = begin - before, first_row = tile * kTileRows;
      const std::int64_t rows = weight.rows - first_row < kTileRows ? weight.rows - first_row : kTileRows;
      tile_kernel(weight.layout, weight.tile(tile), staged.activations, sums);
      write_rows(sums, staged.activations.tokens, staged.token_scales,
                 products->bias == nullptr ? nullptr : products->bias + first_row, rows, weight.rows,
                 products->y + first_token * weight.rows + first_row);
    }
  }
}

// Products whose weights have groups alike.
template <typename StagedT, typename Stage, typename Tile>
int multiply_alike(const bdk_product* products, std::int64_t count, const float* x, std::int64_t tokens,
                   const Widths& widths, bool grouped, Stage stage, Tile tile_kernel) {
  const TileLayout& layout = products->weight->layout;
  std::int64_t tiles = 0, rows = 0;
  for (std::int64_t index = 0; index < count; ++index) {
    tiles += products[index].weight->tiles;
    rows += products[index].weight->rows;
  }
  const std::int64_t rounds = ceil_div(tokens, kMostTokens);
  for (std::int64_t round = 0; round < rounds; ++round) {
    const std::int64_t first = tokens * round / rounds, here = tokens * (round + 1) / rounds - first;
    StagedT staged;
    if (!staged.stage(layout, x + first * layout.columns, static_cast<std::int32_t>(here), widths, grouped,
                      [&](const float* from, auto* values, auto* sums, float* scales) {
                        stage(layout, from, values, sums, scales);
                      }))
      return BDK_NO_MEMORY;
    parallel(tiles, rows * layout.columns * here, [&](std::int64_t begin, std::int64_t end) {
      multiply_tiles(products, begin, end, tile_kernel, staged, first);
    });
  }
  return BDK_OK;
}

}  // namespace

int multiply(const bdk_product* products, std::int64_t count, const float* x, std::int64_t tokens,
             Activation activation) {
  const InstructionSet& set = *instruction_set(chosen_instruction_set());
  const bool grouped = activation == Activation::kInt8PerGroup;
  for (std::int64_t begin = 0, end = 0; begin < count; begin = end) {
    while (end < count && same_groups(products[begin].weight->layout, products[end].weight->layout)) ++end;
    const auto alike = [&](auto staged, const Widths& widths, auto stage, auto tile) {
      return multiply_alike<decltype(staged)>(products + begin, end - begin, x, tokens, widths, grouped, stage, tile);
    };
    const int status =
        activation == Activation::kFloat
            ? alike(
                  Staged<float, float, 1>(), Widths{set.widest_float, 0},
                  [&](const TileLayout& layout, const float* from, float* values, float* sums, float*) {
                    set.stage_token(layout, from, values, sums);
                  },
                  set.float_tile)
            : alike(
                  Staged<std::int8_t, std::int32_t, 4>(), Widths{set.widest_int8, set.matrix_tokens},
                  [&](const TileLayout& layout, const float* from, std::int8_t* values, std::int32_t* sums,
                      float* scales) { set.quantize_token(layout, from, grouped, values, sums, scales); },
                  set.int8_tile);
    if (status != BDK_OK) return status;
  }
  return BDK_OK;
}

}  // namespace bdk
