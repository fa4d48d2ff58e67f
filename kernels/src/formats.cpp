#include "formats.h"

#include <cstring>

#include "bitdistill_kernels.h"

namespace bdk {
namespace {

// Normal-float levels of BitDistiller, in code order.
constexpr float kNf3[8] = {-1.0f,
                           -0.5350227355957031f,
                           -0.2469314038753510f,
                           0.0f,
                           0.1833375245332718f,
                           0.3819939494132996f,
                           0.6229856610298157f,
                           1.0f};

// The same levels as byte integers over a denominator for each sign, chosen among all up to 255 for the smallest
// error: 2.1e-4 and 4.4e-5 of the scale, an eighth of what bf16 rounding of the weight costs.
constexpr float kPositiveDenominator = 191.0f;
constexpr float kNegativeDenominator = 243.0f;
constexpr std::uint8_t kNf3Positive[8] = {0, 0, 0, 0, 35, 73, 119, 191};
constexpr std::uint8_t kNf3Negative[8] = {243, 130, 60, 0, 0, 0, 0, 0};

constexpr FormatTraits kTernary = {Coding::kTwoBit,           2, false, 1, true, 0, 1, 1.0f, 1.0f, 0.0f,
                                   {-1, 0, 1, 0, -1, 0, 1, 0}};
constexpr FormatTraits kInt2 = {
    Coding::kTwoBit, 2, true, 1, false, 0, 0, 1.0f, 1.0f, 1.5f, {-1.5f, -.5f, .5f, 1.5f, -1.5f, -.5f, .5f, 1.5f}};
constexpr FormatTraits kInt3 = {
    Coding::kThreeBit, 3, true, 1, false, 0, 0, 1.0f, 1.0f, 3.5f, {-3.5f, -2.5f, -1.5f, -.5f, .5f, 1.5f, 2.5f, 3.5f}};
constexpr FormatTraits kNormalFloat = {Coding::kNormalFloat,
                                       3,
                                       false,
                                       2,
                                       false,
                                       0,
                                       0,
                                       1.0f,
                                       1.0f,
                                       0.0f,
                                       {kNf3[0], kNf3[1], kNf3[2], kNf3[3], kNf3[4], kNf3[5], kNf3[6], kNf3[7]}};
// (code - 1.5) / 2 = (2 code - 3) / 4
constexpr FormatTraits kSeq2 = {
    Coding::kTwoBit, 2, false, 1, false, 1, 3, 0.25f, 0.5f, 0.0f, {-1.5f, -.5f, .5f, 1.5f, -1.5f, -.5f, .5f, 1.5f}};
constexpr FormatTraits kSeqTernary = {
    Coding::kTwoBit, 2, false, 1, true, 0, 1, 2.0f / 3.0f, 2.0f / 3.0f, 0.0f, {-1, 0, 1, 0, -1, 0, 1, 0}};
constexpr FormatTraits kInt4 = {Coding::kFourBit, 4, true, 1, false, 0, 0, 1.0f, 1.0f, 8.0f, {}};
constexpr FormatTraits kInt8 = {Coding::kEightBit, 8, false, 1, false, 0, 128, 1.0f, 1.0f, 0.0f, {}};
constexpr FormatTraits kLsq3 = {Coding::kThreeBit,           3, false, 1, false, 0, 4, 1.0f, 1.0f, 0.0f,
                                {-4, -3, -2, -1, 0, 1, 2, 3}};

}  // namespace

const FormatTraits* find_format(std::int32_t format) {
  switch (format) {
    case BDK_TERNARY:
      return &kTernary;
    case BDK_INT2:
      return &kInt2;
    case BDK_INT3:
      return &kInt3;
    case BDK_NF3:
      return &kNormalFloat;
    case BDK_SEQ2:
      return &kSeq2;
    case BDK_SEQ_TERNARY:
      return &kSeqTernary;
    case BDK_LSQ3:
      return &kLsq3;
    case BDK_INT4:
      return &kInt4;
    case BDK_INT8:
      return &kInt8;
    default:
      return nullptr;
  }
}

void apply_format(const FormatTraits& traits, TileLayout* layout) {
  layout->coding = traits.coding;
  layout->step_columns = traits.code_bits == 3 ? 32 : 16;
  layout->step_bytes = layout->step_columns * traits.code_bits * kTileRows / 8;
  layout->code_shift = traits.code_shift;
  layout->fixed_zero = traits.fixed_zero;
  layout->integer_factor = traits.integer_factor;
  layout->float_factor = traits.float_factor;
  layout->float_center = traits.float_center;
  for (int code = 0; code < 16; ++code) {
    const float level = traits.float_levels[code % 8];
    layout->float_levels[code] = traits.coding == Coding::kFourBit ? static_cast<float>(code - 8) : level;
  }
  std::memcpy(layout->positive_levels, kNf3Positive, sizeof layout->positive_levels);
  std::memcpy(layout->negative_levels, kNf3Negative, sizeof layout->negative_levels);
  layout->positive_factor = 1.0f / kPositiveDenominator;
  layout->negative_factor = 1.0f / kNegativeDenominator;
}

}  // namespace bdk
