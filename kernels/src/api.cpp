// The C ABI: argument checks, and nothing that throws past it.
#include <atomic>

#include "aligned.h"
#include "bitdistill_kernels.h"
#include "dispatch.h"
#include "matmul.h"
#include "rows.h"
#include "thread_pool.h"
#include "weight.h"

int bdk_abi_version(void) { return BDK_ABI_VERSION; }

const char* bdk_status_text(int status) {
  switch (status) {
    case BDK_OK:
      return "ok";
    case BDK_BAD_ARGUMENT:
      return "a null pointer, a negative count or an unknown enum value";
    case BDK_BAD_SHAPE:
      return "rows, columns or group size outside what is supported";
    case BDK_BAD_SIZE:
      return "a buffer whose bytes are not exactly those of the shape";
    case BDK_BAD_CODE:
      return "a code that the format does not have";
    case BDK_NO_MEMORY:
      return "not enough memory";
    case BDK_UNSUPPORTED:
      return "an instruction set that this machine or build lacks";
    default:
      return "unknown status";
  }
}

int bdk_weight_create(const bdk_weight_description* description, bdk_weight** weight) {
  if (description == nullptr || weight == nullptr) return BDK_BAD_ARGUMENT;
  return bdk::create_weight(*description, weight);
}

void bdk_weight_free(bdk_weight* weight) { delete weight; }

int64_t bdk_weight_bytes(const bdk_weight* weight) {
  return weight == nullptr ? 0 : weight->tiles * weight->tile_bytes;
}

int bdk_weight_rows(const bdk_weight* weight, const int64_t* ids, int64_t count, float* out) {
  if (weight == nullptr || count < 0 || (count > 0 && (ids == nullptr || out == nullptr))) return BDK_BAD_ARGUMENT;
  for (int64_t index = 0; index < count; ++index)
    if (ids[index] < 0 || ids[index] >= weight->rows) return BDK_BAD_ARGUMENT;
  bdk::dequantize_rows(*weight, ids, count, out);
  return BDK_OK;
}

int bdk_matmul(const bdk_weight* weight, const float* x, int64_t tokens, const float* bias, int32_t activation_bits,
               int64_t activation_group, float* y) {
  const bdk_product product = {weight, bias, y};
  return bdk_matmul_shared(&product, 1, x, tokens, activation_bits, activation_group);
}

int bdk_matmul_shared(const bdk_product* products, int64_t count, const float* x, int64_t tokens,
                      int32_t activation_bits, int64_t activation_group) {
  if (count < 0 || tokens < 0 || (count > 0 && products == nullptr)) return BDK_BAD_ARGUMENT;
  if ((activation_bits != 0 && activation_bits != 8) || (activation_bits == 0 && activation_group != 0))
    return BDK_BAD_ARGUMENT;
  for (int64_t index = 0; index < count; ++index) {
    const bdk_product& product = products[index];
    if (product.weight == nullptr || (tokens > 0 && (x == nullptr || product.y == nullptr))) return BDK_BAD_ARGUMENT;
    const bdk::TileLayout& layout = product.weight->layout;
    if (layout.columns != products[0].weight->layout.columns) return BDK_BAD_SHAPE;
    if (activation_group != 0 && activation_group != product.weight->group_size) return BDK_BAD_SHAPE;
  }
  const bdk::Activation activation = activation_bits == 0    ? bdk::Activation::kFloat
                                     : activation_group == 0 ? bdk::Activation::kInt8PerToken
                                                             : bdk::Activation::kInt8PerGroup;
  return bdk::multiply(products, count, x, tokens, activation);
}

int bdk_quantize_activation(const float* x, int64_t tokens, int64_t columns, int64_t group, int8_t* q, float* scale) {
  if (tokens < 0 || columns < 1 || columns > BDK_MAX_COLUMNS || group < 0) return BDK_BAD_SHAPE;
  if (tokens > 0 && (x == nullptr || q == nullptr || scale == nullptr)) return BDK_BAD_ARGUMENT;
  const int64_t size = group == 0 || group > columns ? columns : group;
  bdk::TileLayout row = {};  // steps of one column: nothing is padded
  row.step_columns = 1;
  row.columns = static_cast<int32_t>(columns);
  row.group_size = row.group_steps = static_cast<int32_t>(size);
  row.groups = static_cast<int32_t>((columns + size - 1) / size);
  row.last_group_steps = static_cast<int32_t>(columns - (row.groups - 1) * size);
  const bdk::InstructionSet& set = *bdk::instruction_set(bdk::chosen_instruction_set());
  bdk::Scratch sums;
  void* memory = sums.reserve(static_cast<std::size_t>(row.groups) * sizeof(int32_t));
  if (memory == nullptr) return BDK_NO_MEMORY;
  for (int64_t token = 0; token < tokens; ++token)
    set.quantize_token(row, x + token * columns, true, q + token * columns, static_cast<int32_t*>(memory),
                       scale + token * row.groups);
  return BDK_OK;
}

int bdk_instruction_set_count(void) { return bdk::instruction_set_count(); }

const char* bdk_instruction_set_name(int index) {
  const bdk::InstructionSet* set = bdk::instruction_set(index);
  return set == nullptr ? nullptr : set->name;
}

int bdk_instruction_set_available(int index) { return bdk::instruction_set_available(index) ? 1 : 0; }

int bdk_instruction_set_chosen(void) { return bdk::chosen_instruction_set(); }

int bdk_instruction_set_choose(int index) { return bdk::choose_instruction_set(index) ? BDK_OK : BDK_UNSUPPORTED; }

int bdk_threads(void) { return bdk::threads(); }

int bdk_set_threads(int threads) { return bdk::set_threads(threads) ? BDK_OK : BDK_BAD_ARGUMENT; }

int bdk_read_ways(void) { return bdk::kReadWays; }

uint64_t bdk_read(const void* memory, int64_t bytes, int way) {
  constexpr int64_t kUnit = 4096;
  const bdk::InstructionSet& set = *bdk::instruction_set(bdk::chosen_instruction_set());
  std::atomic<uint64_t> all{0};
  if (memory == nullptr || bytes < kUnit) return 0;
  bdk::parallel(bytes / kUnit, bytes, [&](int64_t begin, int64_t end) {
    all += set.read(static_cast<const uint8_t*>(memory) + begin * kUnit, (end - begin) * kUnit, way);
  });
  return all.load();
}

int64_t bdk_multiply_add(int64_t operations) {
  const bdk::InstructionSet& set = *bdk::instruction_set(bdk::chosen_instruction_set());
  const int64_t rounds = operations / set.multiply_add(0) + 1;
  std::atomic<int64_t> done{0};
  bdk::parallel(rounds, operations,
                [&](int64_t begin, int64_t end) { done += (end - begin) * set.multiply_add(end - begin); });
  return done.load();
}
