// The portable reference: every other instruction set is checked against this one, bit for bit with int8 activations.
//
// A step is decoded to one byte per code, columns outside and rows inside, so that compilers vectorise the products
// over rows with whatever the baseline has (SSE2, NEON).
#include "instruction_sets.h"
#include "staging.inl"

namespace bdk {
namespace {

constexpr int kMaxStepColumns = 32;

float half_to_float(std::uint16_t half) {
  const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000u) << 16;
  const std::uint32_t exponent = (half >> 10) & 0x1fu;
  const std::uint32_t mantissa = half & 0x3ffu;
  if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24
    const float magnitude = static_cast<float>(mantissa) * 5.9604644775390625e-8f;
    return bits_float(float_bits(magnitude) | sign);
  }
  if (exponent == 0x1f) return bits_float(sign | kInfinityBits | (mantissa << 13));
  return bits_float(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

float read_scale(const TileLayout& layout, const std::uint8_t* header, int index) {
  if (layout.fp32_scales) {
    float scale;
    std::memcpy(&scale, header + index * 4, sizeof scale);
    return scale;
  }
  std::uint16_t half;
  std::memcpy(&half, header + index * 2, sizeof half);
  return half_to_float(half);
}

void decode_step(const TileLayout& layout, const std::uint8_t* step, std::uint8_t codes[kMaxStepColumns][kTileRows]) {
  const bool third_bit = layout.step_columns == 32;
  const std::uint8_t* high = step + 2 * kPlaneBytes;
  for (int column = 0; column < layout.step_columns; ++column) {
    const int half = column / 16, field = column % 16 / 4, byte = column % 4;
    const std::uint8_t* low = step + half * kPlaneBytes;
    for (int row = 0; row < kTileRows; ++row) {
      unsigned code = (static_cast<unsigned>(low[row * 4 + byte]) >> (2 * field)) & 3u;
      if (third_bit) code |= ((static_cast<unsigned>(high[row * 4 + byte]) >> (4 * half + field)) & 1u) << 2;
      codes[column][row] = static_cast<std::uint8_t>(code);
    }
  }
}

// One group's exact sums for one token: of code * x, or for NF3 of both signs' levels * x.
struct IntegerSums {
  std::int32_t first[kTileRows];   // codes, or positive levels
  std::int32_t second[kTileRows];  // negative levels
};

void add_step(const TileLayout& layout, const std::uint8_t codes[kMaxStepColumns][kTileRows], const std::int8_t* x,
              IntegerSums* sums) {
  for (int column = 0; column < layout.step_columns; ++column) {
    const std::int32_t value = x[column];
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

void flush_group(const TileLayout& layout, const std::uint8_t* header, const IntegerSums& sums, std::int32_t x_sum,
                 float* out) {
  for (int row = 0; row < kTileRows; ++row) {
    if (layout.coding == Coding::kNormalFloat) {
      const float positive = read_scale(layout, header, row) * layout.positive_factor;
      const float negative = read_scale(layout, header, kTileRows + row) * layout.negative_factor;
      out[row] += positive * static_cast<float>(sums.first[row]);
      out[row] -= negative * static_cast<float>(sums.second[row]);
    } else {
      const std::int32_t zero = layout.zeros_offset ? header[layout.zeros_offset + row] : layout.fixed_zero;
      const std::int32_t value = sums.first[row] * (1 << layout.code_shift) - zero * x_sum;
      out[row] += read_scale(layout, header, row) * layout.integer_factor * static_cast<float>(value);
    }
  }
}

void int8_tile(const TileLayout& layout, const std::uint8_t* tile, Int8Activations x, int tokens, float* out) {
  alignas(kAlignment) std::uint8_t codes[kMaxStepColumns][kTileRows];
  std::memset(out, 0, static_cast<std::size_t>(tokens) * kTileRows * sizeof(float));
  for (int token = 0; token < tokens; ++token) {
    const std::uint8_t* at = tile;
    const std::int8_t* values = x.values + token * x.stride;
    for (std::int32_t group = 0; group < layout.groups; ++group) {
      const std::uint8_t* header = at;
      at += layout.header_bytes;
      IntegerSums sums = {};
      for (std::int32_t step = 0; step < layout.steps_of(group); ++step) {
        decode_step(layout, at, codes);
        add_step(layout, codes, values, &sums);
        at += layout.step_bytes;
        values += layout.step_columns;
      }
      flush_group(layout, header, sums, x.sums[token * x.sums_stride + group], out + token * kTileRows);
    }
  }
}

void float_tile(const TileLayout& layout, const std::uint8_t* tile, FloatActivations x, int tokens, float* out) {
  alignas(kAlignment) std::uint8_t codes[kMaxStepColumns][kTileRows];
  std::memset(out, 0, static_cast<std::size_t>(tokens) * kTileRows * sizeof(float));
  for (int token = 0; token < tokens; ++token) {
    const std::uint8_t* at = tile;
    const float* values = x.values + token * x.stride;
    for (std::int32_t group = 0; group < layout.groups; ++group) {
      const std::uint8_t* header = at;
      at += layout.header_bytes;
      float positive[kTileRows] = {}, negative[kTileRows] = {};
      for (std::int32_t step = 0; step < layout.steps_of(group); ++step) {
        decode_step(layout, at, codes);
        for (int column = 0; column < layout.step_columns; ++column) {
          for (int row = 0; row < kTileRows; ++row) {
            const float level = layout.float_levels[codes[column][row]];
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
          const float zero = static_cast<float>(header[layout.zeros_offset + row]);
          positive[row] += (layout.float_center - zero) * x.sums[token * x.sums_stride + group];
        }
        *sum += read_scale(layout, header, row) * layout.float_factor * positive[row];
        if (layout.coding == Coding::kNormalFloat) *sum += read_scale(layout, header, kTileRows + row) * negative[row];
      }
    }
  }
}

}  // namespace

const InstructionSet kScalar = {"scalar", quantize_token, stage_token, int8_tile, float_tile};

}  // namespace bdk
