#include "rows.h"

#include "codes.h"
#include "thread_pool.h"

namespace bdk {
namespace {

constexpr std::int64_t kWorkPerWeight = 8;  // of one weight, in multiplications

void dequantize_row(const bdk_weight& weight, std::int64_t id, float* out) {
  const TileLayout& layout = weight.layout;
  const std::uint8_t* tile = weight.tile(id / kTileRows);
  const int row = static_cast<int>(id % kTileRows);
  const std::uint8_t* step = tile + layout.steps_offset;
  for (std::int32_t group = 0; group < layout.groups; ++group) {
    const std::int32_t first = group * layout.group_size;
    const std::int32_t columns =
        layout.columns - first < layout.group_size ? layout.columns - first : layout.group_size;
    float values[256];  // of every code
    const float zero = layout.zeros_offset ? static_cast<float>(zero_at(layout, tile, group, row)) : 0.0f;
    const int codes = layout.coding == Coding::kEightBit ? 256 : layout.coding == Coding::kFourBit ? 16 : 8;
    for (int code = 0; code < codes; ++code) {
      const float level = level_of(layout, static_cast<std::uint8_t>(code));
      const bool negative = layout.coding == Coding::kNormalFloat && level < 0.0f;
      const float units = layout.zeros_offset ? level + layout.float_center - zero : level * layout.float_factor;
      values[code] = units * scale_at(layout, tile, group, negative ? 1 : 0, row);
    }
    for (std::int32_t column = 0; column < columns; ++column) {
      const std::int32_t inside = column % layout.step_columns;
      if (column != 0 && inside == 0) step += layout.step_bytes;
      out[first + column] = values[code_at(layout.coding, step, row, inside)];
    }
    step += layout.step_bytes;
  }
}

}  // namespace

void dequantize_rows(const bdk_weight& weight, const std::int64_t* ids, std::int64_t count, float* out) {
  const std::int64_t columns = weight.layout.columns;
  parallel(count, count * columns * kWorkPerWeight, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t index = begin; index < end; ++index) dequantize_row(weight, ids[index], out + index * columns);
  });
}

}  // namespace bdk
