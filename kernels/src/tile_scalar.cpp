// The portable reference: every other instruction set is checked against this one, bit for bit with int8 activations.
//
// A step is decoded to one byte per code, columns outside and rows inside, so that compilers vectorise the products
// over rows with whatever the baseline has (SSE2, NEON).
#include "codes.h"
#include "instruction_sets.h"
#include "staging.inl"

namespace bdk {
namespace {

constexpr int kMaxStepColumns = 32;
constexpr int kBlockTokens = 4;
using Codes = std::uint8_t[kMaxStepColumns][kTileRows];

void decode_step(const TileLayout& layout, const std::uint8_t* step, Codes codes) {
  for (int column = 0; column < layout.step_columns; ++column)
    for (int row = 0; row < kTileRows; ++row) codes[column][row] = code_at(layout.coding, step, row, column);
}

// One group's exact sums for one token: of code * x, or for NF3 of both signs' levels * x.
struct IntegerSums {
  std::int32_t first[kTileRows];   // codes, or positive levels
  std::int32_t second[kTileRows];  // negative levels
};

// `x` is one token of a block of `width`.
void add_step(const TileLayout& layout, const Codes codes, const std::int8_t* x, int width, IntegerSums* sums) {
  for (int column = 0; column < layout.step_columns; ++column) {
    const std::int32_t value = x[column / 4 * 4 * width + column % 4];
    if (layout.coding == Coding::kNormalFloat) {
      for (int row = 0; row < kTileRows; ++row) {
        sums->first[row] += layout.positive_levels[codes[column][row]] * value;
        sums->second[row] += layout.negative_levels[codes[column][row]] * value;
      }
    } else {
      for (int row = 0; row < kTileRows; ++row) sums->first[row] += codes[column][row] * value;
    }
  }
}

void add_group(const TileLayout& layout, const std::uint8_t* tile, std::int32_t group, const IntegerSums& sums,
               std::int32_t x_sum, float x_scale, float* out) {
  for (int row = 0; row < kTileRows; ++row) {
    const float scale = scale_at(layout, tile, group, 0, row);
    if (layout.coding == Coding::kNormalFloat) {
      const float positive = scale * layout.positive_factor * x_scale;
      const float negative = scale_at(layout, tile, group, 1, row) * layout.negative_factor * x_scale;
      out[row] += positive * static_cast<float>(sums.first[row]);
      out[row] -= negative * static_cast<float>(sums.second[row]);
    } else {
      const std::int32_t zero = zero_at(layout, tile, group, row);
      const std::int32_t value = sums.first[row] * (1 << layout.code_shift) - zero * x_sum;
      out[row] += scale * layout.integer_factor * x_scale * static_cast<float>(value);
    }
  }
}

void int8_tile(const TileLayout& layout, const std::uint8_t* tile, const Int8Activations& x, float* out) {
  Codes codes;
  std::memset(out, 0, static_cast<std::size_t>(x.tokens) * kTileRows * sizeof(float));
  for (std::int32_t block = 0; block < x.blocks(); ++block) {
    const int first = x.first_token(block), width = x.first_token(block + 1) - first;
    const std::int8_t* values = x.values + first * x.padded_columns;
    const std::uint8_t* at = tile + layout.steps_offset;
    for (std::int32_t group = 0; group < layout.groups; ++group) {
      IntegerSums sums[kBlockTokens] = {};
      for (std::int32_t step = 0; step < layout.steps_of(group); ++step) {
        decode_step(layout, at, codes);
        for (int t = 0; t < width; ++t) add_step(layout, codes, values + 4 * t, width, &sums[t]);
        at += layout.step_bytes;
        values += layout.step_columns * width;
      }
      for (int t = 0; t < width; ++t) {
        const std::int64_t place = static_cast<std::int64_t>(first + t) * x.groups + group;
        const float x_scale = x.group_scales == nullptr ? 1.0f : x.group_scales[place];
        add_group(layout, tile, group, sums[t], x.sums[place], x_scale, out + (first + t) * kTileRows);
      }
    }
  }
}

void float_tile(const TileLayout& layout, const std::uint8_t* tile, const FloatActivations& x, float* out) {
  Codes codes;
  std::memset(out, 0, static_cast<std::size_t>(x.tokens) * kTileRows * sizeof(float));
  for (std::int32_t token = 0; token < x.tokens; ++token) {  // blocks of one token: rows
    const float* values = x.values + token * x.padded_columns;
    const std::uint8_t* at = tile + layout.steps_offset;
    for (std::int32_t group = 0; group < layout.groups; ++group) {
      float positive[kTileRows] = {}, negative[kTileRows] = {};
      for (std::int32_t step = 0; step < layout.steps_of(group); ++step) {
        decode_step(layout, at, codes);
        for (int column = 0; column < layout.step_columns; ++column) {
          for (int row = 0; row < kTileRows; ++row) {
            const float level = level_of(layout, codes[column][row]);
            const bool other = layout.coding == Coding::kNormalFloat && level < 0.0f;
            (other ? negative : positive)[row] += level * values[column];
          }
        }
        at += layout.step_bytes;
        values += layout.step_columns;
      }
      for (int row = 0; row < kTileRows; ++row) {
        float* sum = out + token * kTileRows + row;
        if (layout.zeros_offset) {
          const float zero = static_cast<float>(zero_at(layout, tile, group, row));
          positive[row] += (layout.float_center - zero) * x.sums[token * x.groups + group];
        }
        *sum += scale_at(layout, tile, group, 0, row) * layout.float_factor * positive[row];
        if (layout.coding == Coding::kNormalFloat) *sum += scale_at(layout, tile, group, 1, row) * negative[row];
      }
    }
  }
}

std::uint64_t read(const std::uint8_t* memory, std::int64_t bytes, int) {
  std::uint64_t sums[4] = {};
  for (std::int64_t at = 0; at < bytes; at += sizeof sums) {
    std::uint64_t words[4];
    std::memcpy(words, memory + at, sizeof words);
    for (int lane = 0; lane < 4; ++lane) sums[lane] += words[lane];
  }
  return sums[0] + sums[1] + sums[2] + sums[3];
}

std::int64_t multiply_add(std::int64_t rounds) {
  constexpr int kLanes = 64;
  volatile std::int32_t factor = 3;
  std::int32_t sums[kLanes] = {};
  for (std::int64_t round = 0; round < rounds; ++round) {
    const std::int32_t value = factor;
    for (int lane = 0; lane < kLanes; ++lane) sums[lane] = sums[lane] * value + lane;
  }
  for (int lane = 1; lane < kLanes; ++lane) sums[0] += sums[lane];
  factor = sums[0];
  return 2 * kLanes;
}

}  // namespace

const InstructionSet kScalar = {"scalar",  kBlockTokens, 1,    quantize_token, stage_token,
                                int8_tile, float_tile,   read, multiply_add};

}  // namespace bdk
