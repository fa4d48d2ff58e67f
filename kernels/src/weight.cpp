#include "weight.h"

#include <atomic>
#include <cstring>
#include <memory>

#include "formats.h"
#include "thread_pool.h"

namespace bdk {
namespace {

constexpr std::int64_t kMaxRows = std::int64_t{1} << 31;

std::int64_t ceil_div(std::int64_t value, std::int64_t by) { return (value + by - 1) / by; }

std::int64_t code_row_bytes(std::int64_t codes, int bits) {
  return bits == 3 ? ceil_div(codes * 2, 8) + ceil_div(codes, 8) : ceil_div(codes * bits, 8);
}

// Bits `first_bit` and up of a plane, at most 32 of them, `count` valid; never reads past their last byte.
std::uint32_t read_bits(const std::uint8_t* plane, std::int64_t first_bit, int count) {
  const std::uint8_t* from = plane + first_bit / 8;
  const int shift = static_cast<int>(first_bit % 8);
  const int bytes = (shift + count + 7) / 8;
  std::uint64_t word = 0;
  for (int byte = 0; byte < bytes; ++byte) word |= static_cast<std::uint64_t>(from[byte]) << (8 * byte);
  word >>= shift;
  return static_cast<std::uint32_t>(count == 32 ? word : word & ((std::uint64_t{1} << count) - 1));
}

std::uint32_t swap_bits(std::uint32_t word, int distance, std::uint32_t mask) {
  const std::uint32_t different = ((word >> distance) ^ word) & mask;
  return word ^ different ^ (different << distance);
}

// Sixteen 2-bit codes, column 4i + j in byte i, field j, to column 4f + b in byte b, field f: a 4x4 transposition.
std::uint32_t arrange_low(std::uint32_t word) { return swap_bits(swap_bits(word, 6, 0x00CC00CCu), 12, 0x0000F0F0u); }

// Thirty-two third bits in order, to column 16h + 4f + b in byte b, bit kThirdBitPlaces[f] + h: two 4x4 transpositions
// of bits and a shuffle of nibbles bring it to bit 4h + f.
std::uint32_t arrange_high(std::uint32_t word) {
  word = swap_bits(swap_bits(word, 3, 0x0A0A0A0Au), 6, 0x00CC00CCu);
  word = swap_bits(swap_bits(word, 8, 0x0000FF00u), 4, 0x00F000F0u);
  std::uint32_t arranged = 0;
  for (int half = 0; half < 2; ++half)
    for (int field = 0; field < 4; ++field)
      arranged |= ((word >> (4 * half + field)) & 0x01010101u) << (kThirdBitPlaces[field] + half);
  return arranged;
}

// Eight 4-bit codes in order, to column 4n + b in half n of byte b.
std::uint32_t arrange_nibbles(std::uint32_t word) { return swap_bits(swap_bits(word, 8, 0x0000FF00u), 4, 0x00F000F0u); }

void store_little_endian(std::uint8_t* at, std::uint32_t word) {
  for (int byte = 0; byte < 4; ++byte) at[byte] = static_cast<std::uint8_t>(word >> (8 * byte));
}

class Repacker {
 public:
  Repacker(const bdk_weight_description& from, const FormatTraits& traits, bdk_weight* to)
      : from_(from), traits_(traits), to_(to), row_bytes_(code_row_bytes(from.columns, traits.code_bits)) {}

  // False where a code does not exist in the format.
  bool repack() {
    parallel(to_->tiles, to_->rows * from_.columns, [this](std::int64_t begin, std::int64_t end) {
      for (std::int64_t tile = begin; tile < end; ++tile) repack_tile(tile);
    });
    return !bad_code_.load();
  }

 private:
  void repack_tile(std::int64_t index) {
    const TileLayout& layout = to_->layout;
    std::uint8_t* at = to_->bytes.get() + index * to_->tile_bytes;
    const std::int64_t first_row = index * kTileRows;
    const int rows = static_cast<int>(from_.rows - first_row < kTileRows ? from_.rows - first_row : kTileRows);
    std::uint8_t* tile = at;
    at += layout.steps_offset;
    for (std::int32_t group = 0; group < layout.groups; ++group) {
      for (int row = 0; row < rows; ++row) write_header(tile, first_row + row, row, group);
      const std::int64_t first = static_cast<std::int64_t>(group) * layout.group_size;
      const std::int64_t end = first + layout.group_size < layout.columns ? first + layout.group_size : layout.columns;
      for (std::int64_t column = first; column < end; column += layout.step_columns) {
        const int columns = static_cast<int>(end - column < layout.step_columns ? end - column : layout.step_columns);
        for (int row = 0; row < rows; ++row) write_step(at, first_row + row, row, column, columns);
        at += layout.step_bytes;
      }
    }
  }

  void write_header(std::uint8_t* tile, std::int64_t row, int lane, std::int32_t group) {
    const TileLayout& layout = to_->layout;
    const std::size_t scale_bytes = layout.fp32_scales ? 4 : 2;
    const std::int64_t index = from_.granularity == BDK_PER_TENSOR ? 0 : row * layout.groups + group;
    const std::uint8_t* scales = static_cast<const std::uint8_t*>(from_.scales);
    std::uint8_t* header = tile + static_cast<std::int64_t>(group) * layout.scale_bytes;
    for (int sign = 0; sign < traits_.scales_per_group; ++sign) {
      const std::int64_t source = index * traits_.scales_per_group + sign;
      std::memcpy(header + static_cast<std::size_t>(sign * kTileRows + lane) * scale_bytes,
                  scales + static_cast<std::size_t>(source) * scale_bytes, scale_bytes);
    }
    if (!traits_.has_zero_point) return;
    const bool one = from_.granularity == BDK_PER_TENSOR;
    const int bits = traits_.code_bits;
    const std::uint8_t* zeros = from_.zeros + (one ? 0 : row * code_row_bytes(layout.groups, bits));
    const int low_bits = bits == 3 ? 2 : bits;
    std::uint32_t zero = read_bits(zeros, low_bits * static_cast<std::int64_t>(group), low_bits);
    if (bits == 3) zero |= read_bits(zeros + ceil_div(layout.groups * std::int64_t{2}, 8), group, 1) << 2;
    std::uint8_t* at = tile + layout.zeros_offset + static_cast<std::int64_t>(group) * kZeroBytes + lane % kZeroBytes;
    *at = static_cast<std::uint8_t>(*at | zero << (lane / kZeroBytes * 4));
  }

  void write_step(std::uint8_t* step, std::int64_t row, int lane, std::int64_t column, int columns) {
    const std::uint8_t* codes = from_.codes + row * row_bytes_;
    switch (traits_.code_bits) {
      case 4:
        return write_nibbles(step, codes, lane, column, columns);
      case 8:
        return write_bytes(step, codes + column, lane, columns);
      default:
        return write_planes(step, codes, lane, column, columns);
    }
  }

  // 2- and 3-bit codes.
  void write_planes(std::uint8_t* step, const std::uint8_t* low, int lane, std::int64_t column, int columns) {
    for (int half = 0; 16 * half < columns; ++half) {
      const int here = columns - 16 * half < 16 ? columns - 16 * half : 16;
      const std::uint32_t codes = read_bits(low, 2 * (column + 16 * half), 2 * here);
      if (traits_.ternary && (codes & (codes >> 1) & 0x55555555u) != 0) bad_code_.store(true);
      store_little_endian(step + half * kPlaneBytes + lane * 4, arrange_low(codes));
    }
    if (traits_.code_bits == 2) return;
    const std::uint8_t* high = low + ceil_div(from_.columns * 2, 8);
    store_little_endian(step + 2 * kPlaneBytes + lane * 4, arrange_high(read_bits(high, column, columns)));
  }

  static void write_nibbles(std::uint8_t* step, const std::uint8_t* codes, int lane, std::int64_t column, int columns) {
    for (int first = 0; first < columns; first += 8) {
      const int here = columns - first < 8 ? columns - first : 8;
      const std::uint32_t eight = read_bits(codes, 4 * (column + first), 4 * here);
      store_little_endian(step + first / 8 * kPlaneBytes + lane * 4, arrange_nibbles(eight));
    }
  }

  void write_bytes(std::uint8_t* step, const std::uint8_t* codes, int lane, int columns) {
    for (int column = 0; column < columns; ++column) {
      if (codes[column] == 0) bad_code_.store(true);
      step[column / 4 * kPlaneBytes + lane * 4 + column % 4] = codes[column];
    }
  }

  const bdk_weight_description& from_;
  const FormatTraits& traits_;
  bdk_weight* to_;
  std::int64_t row_bytes_;
  std::atomic<bool> bad_code_{false};
};

// The layout, and the sizes that the description's buffers must have.
int check(const bdk_weight_description& from, const FormatTraits& traits, TileLayout* layout) {
  if (from.rows < 1 || from.rows > kMaxRows || from.columns < 1 || from.columns > BDK_MAX_COLUMNS) return BDK_BAD_SHAPE;
  const bool grouped = from.granularity == BDK_PER_GROUP;
  if (grouped && from.group_size < 1) return BDK_BAD_SHAPE;
  apply_format(traits, layout);
  const std::int64_t group_size = grouped && from.group_size < from.columns ? from.group_size : from.columns;
  layout->columns = static_cast<std::int32_t>(from.columns);
  layout->group_size = static_cast<std::int32_t>(group_size);
  layout->groups = static_cast<std::int32_t>(ceil_div(from.columns, group_size));
  layout->group_steps = static_cast<std::int32_t>(ceil_div(group_size, layout->step_columns));
  const std::int64_t last = from.columns - (layout->groups - 1) * group_size;
  layout->last_group_steps = static_cast<std::int32_t>(ceil_div(last, layout->step_columns));
  layout->fp32_scales = from.scale_type == BDK_FP32;
  const std::int32_t scale_bytes = layout->fp32_scales ? 4 : 2;
  layout->scale_bytes = traits.scales_per_group * kTileRows * scale_bytes;
  const std::int32_t all_scales = layout->groups * layout->scale_bytes;
  layout->zeros_offset = traits.has_zero_point ? all_scales : 0;
  const std::int32_t headers = all_scales + (traits.has_zero_point ? layout->groups * kZeroBytes : 0);
  layout->steps_offset = static_cast<std::int32_t>(ceil_div(headers, kAlignment) * kAlignment);

  const std::int64_t scaled_rows = from.granularity == BDK_PER_TENSOR ? 1 : from.rows;
  const std::int64_t scales = scaled_rows * layout->groups * traits.scales_per_group;
  const std::int64_t zeros = scaled_rows * code_row_bytes(layout->groups, traits.code_bits);
  if (from.codes_bytes != from.rows * code_row_bytes(from.columns, traits.code_bits)) return BDK_BAD_SIZE;
  if (from.scales_bytes != scales * scale_bytes) return BDK_BAD_SIZE;
  if (from.zeros_bytes != (traits.has_zero_point ? zeros : 0)) return BDK_BAD_SIZE;
  return BDK_OK;
}

}  // namespace

int create_weight(const bdk_weight_description& from, bdk_weight** weight) {
  const FormatTraits* traits = find_format(from.format);
  if (traits == nullptr || from.codes == nullptr || from.scales == nullptr) return BDK_BAD_ARGUMENT;
  if (traits->has_zero_point != (from.zeros != nullptr)) return BDK_BAD_ARGUMENT;
  if (from.granularity < BDK_PER_TENSOR || from.granularity > BDK_PER_GROUP) return BDK_BAD_ARGUMENT;
  if (from.scale_type != BDK_FP16 && from.scale_type != BDK_FP32) return BDK_BAD_ARGUMENT;
  std::unique_ptr<bdk_weight> made(new (std::nothrow) bdk_weight);
  if (!made) return BDK_NO_MEMORY;
  const int status = check(from, *traits, &made->layout);
  if (status != BDK_OK) return status;
  const TileLayout& layout = made->layout;
  made->rows = from.rows;
  made->group_size = from.granularity == BDK_PER_GROUP ? from.group_size : 0;
  made->tiles = ceil_div(from.rows, kTileRows);
  made->tile_bytes = layout.steps_offset + layout.padded_columns() / layout.step_columns * layout.step_bytes;
  made->bytes = allocate_weight(static_cast<std::size_t>(made->tiles * made->tile_bytes));
  if (!made->bytes) return BDK_NO_MEMORY;
  if (!Repacker(from, *traits, made.get()).repack()) return BDK_BAD_CODE;
  *weight = made.release();
  return BDK_OK;
}

}  // namespace bdk
