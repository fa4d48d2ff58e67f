// A self-checking run over formats, granularities and odd shapes, for sanitizers and for machines without Python.
//
// Every buffer is exactly as large as its shape says, on the heap, so that AddressSanitizer sees any byte read or
// written outside.  With int8 activations each instruction set must give the scalar one's bits; with fp32 activations
// it must come close; a buffer one byte short must be refused; and two callers at once must not disturb each other.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "bitdistill_kernels.h"

namespace {

struct Case {
  int format;
  int granularity;
  int scale_type;
  std::int64_t rows, columns, group_size, tokens;
};

int bits_of(int format) {
  if (format == BDK_INT4) return 4;
  if (format == BDK_INT8) return 8;
  return format == BDK_INT3 || format == BDK_NF3 || format == BDK_LSQ3 ? 3 : 2;
}
bool has_zeros(int format) { return format == BDK_INT2 || format == BDK_INT3 || format == BDK_INT4; }
bool is_ternary(int format) { return format == BDK_TERNARY || format == BDK_SEQ_TERNARY; }
std::int64_t ceil_div(std::int64_t value, std::int64_t by) { return (value + by - 1) / by; }

std::int64_t packed_bytes(std::int64_t codes, int bits) {
  return bits == 3 ? ceil_div(2 * codes, 8) + ceil_div(codes, 8) : ceil_div(bits * codes, 8);
}

struct Problem {
  std::vector<std::uint8_t> codes, scales, zeros;
  std::vector<float> x, bias;
  bdk_weight_description description = {};

  Problem(const Case& c, std::mt19937* random) {
    const int bits = bits_of(c.format);
    const std::int64_t groups = c.granularity == BDK_PER_GROUP ? ceil_div(c.columns, c.group_size) : 1;
    const std::int64_t scaled_rows = c.granularity == BDK_PER_TENSOR ? 1 : c.rows;
    codes.resize(static_cast<std::size_t>(c.rows * packed_bytes(c.columns, bits)));
    for (std::uint8_t& byte : codes) {
      byte = static_cast<std::uint8_t>((*random)());
      if (is_ternary(c.format)) byte &= static_cast<std::uint8_t>(~((byte & 0x55u) << 1));  // no code 3
      if (c.format == BDK_INT8 && byte == 0) byte = 1;
    }
    const std::int64_t scale_count = scaled_rows * groups * (c.format == BDK_NF3 ? 2 : 1);
    scales.resize(static_cast<std::size_t>(scale_count * (c.scale_type == BDK_FP32 ? 4 : 2)));
    for (std::int64_t index = 0; index < scale_count; ++index) {
      const std::uint32_t exponent = (*random)() % 8;
      const std::uint16_t half = static_cast<std::uint16_t>((exponent + 8) << 10 | ((*random)() & 0x3ff));
      const float single =
          std::ldexp(1.0f + static_cast<float>(half & 0x3ff) / 1024.0f, static_cast<int>(exponent) - 7);
      if (c.scale_type == BDK_FP32) {
        std::memcpy(&scales[static_cast<std::size_t>(index) * 4], &single, 4);
      } else {
        std::memcpy(&scales[static_cast<std::size_t>(index) * 2], &half, 2);
      }
    }
    if (has_zeros(c.format)) {
      zeros.resize(static_cast<std::size_t>(scaled_rows * packed_bytes(groups, bits)));
      for (std::uint8_t& byte : zeros) byte = static_cast<std::uint8_t>((*random)());
    }
    std::normal_distribution<float> normal;
    x.resize(static_cast<std::size_t>(c.tokens * c.columns));
    bias.resize(static_cast<std::size_t>(c.rows));
    for (float& value : x) value = normal(*random);
    for (float& value : bias) value = normal(*random);
    description.format = c.format;
    description.granularity = c.granularity;
    description.scale_type = c.scale_type;
    description.rows = c.rows;
    description.columns = c.columns;
    description.group_size = c.group_size;
    description.codes = codes.data();
    description.codes_bytes = static_cast<std::int64_t>(codes.size());
    description.scales = scales.data();
    description.scales_bytes = static_cast<std::int64_t>(scales.size());
    description.zeros = zeros.empty() ? nullptr : zeros.data();
    description.zeros_bytes = static_cast<std::int64_t>(zeros.size());
  }
};

int failures = 0;

void expect(bool holds, const std::string& what) {
  if (holds) return;
  ++failures;
  std::fprintf(stderr, "FAILED: %s\n", what.c_str());
}

std::vector<float> multiply(const bdk_weight* weight, const Problem& problem, const Case& c, int activation_bits,
                            std::int64_t activation_group = 0) {
  std::vector<float> y(static_cast<std::size_t>(c.tokens * c.rows));
  const int status =
      bdk_matmul(weight, problem.x.data(), c.tokens, problem.bias.data(), activation_bits, activation_group, y.data());
  expect(status == BDK_OK, bdk_status_text(status));
  return y;
}

void check_short_buffers(const bdk_weight_description& good) {
  bdk_weight* weight = nullptr;
  bdk_weight_description bad = good;
  bad.codes_bytes -= 1;
  expect(bdk_weight_create(&bad, &weight) == BDK_BAD_SIZE, "short codes are refused");
  bad = good;
  bad.scales_bytes -= 1;
  expect(bdk_weight_create(&bad, &weight) == BDK_BAD_SIZE, "short scales are refused");
  bad = good;
  bad.columns = BDK_MAX_COLUMNS + 1;
  expect(bdk_weight_create(&bad, &weight) == BDK_BAD_SHAPE, "too many columns are refused");
  bad = good;
  bad.format = 99;
  expect(bdk_weight_create(&bad, &weight) == BDK_BAD_ARGUMENT, "an unknown format is refused");
}

void check_case(const Case& c, std::mt19937* random) {
  const Problem problem(c, random);
  const std::string name = "format " + std::to_string(c.format) + " granularity " + std::to_string(c.granularity) +
                           " [" + std::to_string(c.rows) + ", " + std::to_string(c.columns) + "] group " +
                           std::to_string(c.group_size) + " tokens " + std::to_string(c.tokens);
  bdk_weight* weight = nullptr;
  expect(bdk_weight_create(&problem.description, &weight) == BDK_OK, name + ": created");
  if (weight == nullptr) return;
  check_short_buffers(problem.description);
  const int scalar = bdk_instruction_set_count() - 1;
  const std::int64_t group = c.granularity == BDK_PER_GROUP ? c.group_size : 0;
  for (const auto& [activation_bits, activation_group] : {std::pair<int, std::int64_t>{0, 0}, {8, 0}, {8, group}}) {
    bdk_instruction_set_choose(scalar);
    const std::vector<float> expected = multiply(weight, problem, c, activation_bits, activation_group);
    for (int set = 0; set < scalar; ++set) {
      if (!bdk_instruction_set_available(set)) continue;
      bdk_instruction_set_choose(set);
      const std::vector<float> y = multiply(weight, problem, c, activation_bits, activation_group);
      float worst = 0.0f;
      for (std::size_t i = 0; i < y.size(); ++i) worst = std::fmax(worst, std::fabs(y[i] - expected[i]));
      const bool same = std::memcmp(y.data(), expected.data(), y.size() * sizeof(float)) == 0;
      const float unit = c.format == BDK_INT8 ? 64.0f : c.format == BDK_INT4 ? 8.0f : 1.0f;
      const float bound = unit * (1e-5f * static_cast<float>(c.columns) + 1e-4f);
      expect(activation_bits == 8 ? same : worst < bound, name + " on " + bdk_instruction_set_name(set));
    }
  }
  bdk_weight_free(weight);
}

void check_two_callers(std::mt19937* random) {
  const Case c = {BDK_INT2, BDK_PER_GROUP, BDK_FP16, 512, 512, 128, 4};
  const Problem problem(c, random);
  bdk_weight* weight = nullptr;
  expect(bdk_weight_create(&problem.description, &weight) == BDK_OK, "two callers: created");
  const std::vector<float> expected = multiply(weight, problem, c, 8);
  bool same[2] = {true, true};
  const auto call = [&](bool* all) {
    for (int round = 0; round < 50; ++round) *all = *all && multiply(weight, problem, c, 8) == expected;
  };
  std::thread first(call, &same[0]), second(call, &same[1]);
  first.join();
  second.join();
  expect(same[0] && same[1], "two callers get what one gets");
  bdk_weight_free(weight);
}

// Descriptions whose buffers are honest and whose numbers are not: refused, or read within the buffers.
void check_wild_descriptions(std::mt19937* random) {
  const std::int64_t wild[] = {
      -1, 0, 1, 2, 7, 8, 9, 16, 31, 32, 33, 100, 257, 65536, 65537, std::int64_t{1} << 31, INT64_MIN, INT64_MAX};
  const auto draw = [&] { return wild[(*random)() % (sizeof wild / sizeof wild[0])]; };
  for (int round = 0; round < 3000; ++round) {
    const int format = static_cast<int>((*random)() % (BDK_INT8 + 1));
    const Case c = {format, BDK_PER_GROUP, BDK_FP16, 33, 100, 24, 1};
    const Problem problem(c, random);
    bdk_weight_description description = problem.description;
    for (int change = 0; change < 3; ++change) {
      switch ((*random)() % 7) {
        case 0:
          description.format = static_cast<std::int32_t>(draw());
          break;
        case 1:
          description.granularity = static_cast<std::int32_t>(draw());
          break;
        case 2:
          description.scale_type = static_cast<std::int32_t>(draw());
          break;
        case 3:
          description.rows = draw();
          break;
        case 4:
          description.columns = draw();
          break;
        case 5:
          description.group_size = draw();
          break;
        default:
          description.zeros = nullptr;
          description.zeros_bytes = 0;
      }
    }
    bdk_weight* weight = nullptr;
    const int status = bdk_weight_create(&description, &weight);
    expect((status == BDK_OK) == (weight != nullptr), "a weight where all is well, and none otherwise");
    bdk_weight_free(weight);
  }
}

void check_rows_and_shared(std::mt19937* random) {
  const Case c = {BDK_INT4, BDK_PER_GROUP, BDK_FP16, 70, 257, 100, 9};
  const Problem problem(c, random);
  bdk_weight* weight = nullptr;
  expect(bdk_weight_create(&problem.description, &weight) == BDK_OK, "rows: created");
  const std::int64_t ids[] = {0, 69, 33};
  std::vector<float> rows(static_cast<std::size_t>(3 * c.columns));
  expect(bdk_weight_rows(weight, ids, 3, rows.data()) == BDK_OK, "rows are there");
  const std::int64_t past = 70;
  expect(bdk_weight_rows(weight, &past, 1, rows.data()) == BDK_BAD_ARGUMENT, "a row past the end is refused");
  std::vector<float> first(static_cast<std::size_t>(c.tokens * c.rows)), second(first.size());
  const bdk_product products[] = {{weight, problem.bias.data(), first.data()}, {weight, nullptr, second.data()}};
  expect(bdk_matmul_shared(products, 2, problem.x.data(), c.tokens, 8, 100) == BDK_OK, "two products of one input");
  expect(first == multiply(weight, problem, c, 8, 100), "a shared product is the product");
  bdk_weight_free(weight);
}

}  // namespace

int main() {
  std::mt19937 random(7);
  const std::int64_t shapes[][3] = {{1, 1, 1}, {3, 17, 2}, {33, 100, 5}, {64, 576, 13}, {70, 257, 27}, {40, 290, 47}};
  const std::int64_t group_sizes[] = {8, 24, 100, 128};
  int cases = 0;
  bdk_set_threads(3);
  for (int format = BDK_TERNARY; format <= BDK_INT8; ++format) {
    for (const auto& shape : shapes) {
      for (const int scale_type : {BDK_FP16, BDK_FP32}) {
        for (const int granularity : {BDK_PER_TENSOR, BDK_PER_ROW}) {
          check_case({format, granularity, scale_type, shape[0], shape[1], 0, shape[2]}, &random);
          ++cases;
        }
        for (const std::int64_t group_size : group_sizes) {
          check_case({format, BDK_PER_GROUP, scale_type, shape[0], shape[1], group_size, shape[2]}, &random);
          ++cases;
        }
      }
    }
  }
  check_two_callers(&random);
  check_wild_descriptions(&random);
  check_rows_and_shared(&random);
  std::printf("%d cases, %d failures\n", cases, failures);
  return failures == 0 ? 0 : 1;
}
