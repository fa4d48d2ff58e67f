// The C ABI: argument checks, and nothing that throws past it.
#include "bitdistill_kernels.h"
#include "dispatch.h"
#include "matmul.h"
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

int bdk_matmul(const bdk_weight* weight, const float* x, int64_t tokens, const float* bias, int32_t activation_bits,
               float* y) {
  if (weight == nullptr || tokens < 0 || (tokens > 0 && (x == nullptr || y == nullptr))) return BDK_BAD_ARGUMENT;
  switch (activation_bits) {
    case 0:
      return bdk::multiply_fp32(*weight, x, tokens, bias, y);
    case 8:
      return bdk::multiply_int8(*weight, x, tokens, bias, y);
    default:
      return BDK_BAD_ARGUMENT;
  }
}

int bdk_quantize_activation(const float* x, int64_t tokens, int64_t columns, int8_t* q, float* scale) {
  if (tokens < 0 || columns < 1 || columns > BDK_MAX_COLUMNS) return BDK_BAD_SHAPE;
  if (tokens > 0 && (x == nullptr || q == nullptr || scale == nullptr)) return BDK_BAD_ARGUMENT;
  bdk::TileLayout row = {};  // one group, steps of one column: nothing is padded
  row.groups = row.group_steps = row.step_columns = 1;
  row.columns = row.group_size = static_cast<int32_t>(columns);
  row.last_group_steps = row.columns;
  const bdk::InstructionSet& set = *bdk::instruction_set(bdk::chosen_instruction_set());
  for (int64_t token = 0; token < tokens; ++token) {
    int32_t sum = 0;
    scale[token] = set.quantize_token(row, x + token * columns, q + token * columns, &sum);
  }
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
