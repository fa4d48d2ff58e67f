// A self-checking run of the native decoder, for sanitizers and for machines without Python.
//
// A small random model, dense or packed, with norms in front of its linears and of its heads, windows and a soft cap,
// every buffer exactly as large as its shape says.  Several sequences that share passes, are cut in chunks, and are
// copied to another slot must give the bits that each gives alone; on every instruction set; and what does not fit
// must be refused.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "bitdistill_decoder.h"

namespace {

int checks = 0, failures = 0;

void expect(bool truth, const std::string& what) {
  ++checks;
  if (truth) return;
  std::fprintf(stderr, "FAILED: %s\n", what.c_str());
  ++failures;
}

struct Weights {
  std::mt19937 random{7};
  std::vector<std::unique_ptr<float[]>> floats;
  std::vector<std::unique_ptr<std::uint16_t[]>> halves;
  std::vector<bdk_weight*> packed;

  ~Weights() {
    for (bdk_weight* weight : packed) bdk_weight_free(weight);
  }

  const float* vector(std::int64_t size, float centre, float spread) {
    std::normal_distribution<float> normal(centre, spread);
    floats.emplace_back(new float[static_cast<std::size_t>(size)]);
    for (std::int64_t i = 0; i < size; ++i) floats.back()[static_cast<std::size_t>(i)] = normal(random);
    return floats.back().get();
  }

  bdk_linear dense(std::int64_t rows, std::int64_t columns, int type) {
    bdk_linear made = {};
    made.rows = rows;
    made.columns = columns;
    made.value_type = type;
    if (type == BDK_VALUE_FP32) {
      made.dense = vector(rows * columns, 0.0f, 0.2f);
      return made;
    }
    halves.emplace_back(new std::uint16_t[static_cast<std::size_t>(rows * columns)]);
    for (std::int64_t i = 0; i < rows * columns; ++i)  // of magnitude 1/8 to 1/2 in either type
      halves.back()[static_cast<std::size_t>(i)] = static_cast<std::uint16_t>(
          (random() & 1) << 15 | (type == BDK_VALUE_FP16 ? 0x3000 | (random() & 0x7ff) : 0x3e00 | (random() & 0xff)));
    made.dense = halves.back().get();
    return made;
  }

  bdk_linear ternary(std::int64_t rows, std::int64_t columns, int activation_bits) {
    const std::size_t bytes = static_cast<std::size_t>(rows * ((columns + 3) / 4));
    std::vector<std::uint8_t> codes(bytes);
    for (std::uint8_t& byte : codes) {
      byte = static_cast<std::uint8_t>(random());
      byte &= static_cast<std::uint8_t>(~((byte & 0x55u) << 1));
    }
    const float scale = 0.25f;
    bdk_weight_description description = {};
    description.format = BDK_TERNARY;
    description.granularity = BDK_PER_TENSOR;
    description.scale_type = BDK_FP32;
    description.rows = rows;
    description.columns = columns;
    description.codes = codes.data();
    description.codes_bytes = static_cast<std::int64_t>(bytes);
    description.scales = &scale;
    description.scales_bytes = sizeof scale;
    bdk_weight* weight = nullptr;
    expect(bdk_weight_create(&description, &weight) == BDK_OK, "a ternary weight");
    packed.push_back(weight);
    bdk_linear made = {};
    made.packed = weight;
    made.rows = rows;
    made.columns = columns;
    made.activation_bits = activation_bits;
    return made;
  }
};

constexpr std::int64_t kHidden = 36, kHeads = 6, kKeyHeads = 2, kSize = 10, kFfn = 44, kVocabulary = 29, kLayers = 2;
constexpr std::int64_t kPositions = 400, kSlots = 3;

struct Example {
  Weights weights;
  std::vector<bdk_layer> layers;
  bdk_model model = {};

  Example(int type, bool packed, int activation_bits) {
    const auto linear = [&](std::int64_t rows, std::int64_t columns, bool normed) {
      bdk_linear made = packed ? weights.ternary(rows, columns, activation_bits) : weights.dense(rows, columns, type);
      made.bias = weights.vector(rows, 0.0f, 0.1f);
      if (normed) made.norm_gain = weights.vector(columns, 1.0f, 0.1f);
      made.norm_eps = 1e-6f;
      return made;
    };
    for (std::int64_t index = 0; index < kLayers; ++index) {
      bdk_layer layer = {};
      layer.query = linear(kHeads * kSize, kHidden, false);
      layer.key = linear(kKeyHeads * kSize, kHidden, true);
      layer.value = linear(kKeyHeads * kSize, kHidden, false);
      layer.output = linear(kHidden, kHeads * kSize, true);
      layer.gate = linear(kFfn, kHidden, false);
      layer.up = linear(kFfn, kHidden, true);
      layer.down = linear(kHidden, kFfn, true);
      layer.attention_norm = weights.vector(kHidden, 1.0f, 0.1f);
      layer.ffn_norm = weights.vector(kHidden, 1.0f, 0.1f);
      layer.attention_out_norm = index == 0 ? weights.vector(kHidden, 1.0f, 0.1f) : nullptr;
      layer.ffn_out_norm = index == 0 ? weights.vector(kHidden, 1.0f, 0.1f) : nullptr;
      layer.query_norm = index == 0 ? nullptr : weights.vector(kSize, 1.0f, 0.1f);
      layer.key_norm = index == 0 ? nullptr : weights.vector(kSize, 1.0f, 0.1f);
      layer.window = index == 0 ? 21 : 0;
      layer.rope = index;
      layers.push_back(layer);
    }
    model.hidden = kHidden;
    model.heads = kHeads;
    model.key_heads = kKeyHeads;
    model.head_size = kSize;
    model.ffn = kFfn;
    model.vocabulary = kVocabulary;
    model.layer_count = kLayers;
    model.layers = layers.data();
    model.embedding = weights.dense(kVocabulary, kHidden, type);
    model.head = model.embedding;
    model.last_norm = weights.vector(kHidden, 1.0f, 0.1f);
    model.cosines = weights.vector(2 * kPositions * kSize / 2, 0.0f, 0.7f);
    model.sines = weights.vector(2 * kPositions * kSize / 2, 0.0f, 0.7f);
    model.rope_count = 2;
    model.positions = kPositions;
    model.activation = packed ? BDK_GELU_TANH : BDK_SILU;
    model.norm_eps = 1e-5f;
    model.attention_scale = 0.3f;
    model.embedding_scale = 1.5f;
    model.soft_cap = packed ? 5.0f : 0.0f;
  }
};

struct Decoder {
  bdk_decoder* handle = nullptr;
  explicit Decoder(const bdk_model& model, int cache) {
    expect(bdk_decoder_create(&model, kSlots, kPositions, cache, &handle) == BDK_OK, "a decoder");
  }
  Decoder(const Decoder&) = delete;
  Decoder& operator=(const Decoder&) = delete;
  ~Decoder() { bdk_decoder_free(handle); }

  std::vector<float> forward(const std::vector<std::int64_t>& slots, const std::vector<std::int64_t>& starts,
                             const std::vector<std::vector<std::int64_t>>& chunks, std::int64_t wanted) {
    std::vector<std::int64_t> counts, ids, all;
    for (const auto& chunk : chunks) {
      counts.push_back(static_cast<std::int64_t>(chunk.size()));
      ids.insert(ids.end(), chunk.begin(), chunk.end());
      all.push_back(wanted);
    }
    std::vector<float> logits(slots.size() * static_cast<std::size_t>(wanted * kVocabulary));
    expect(bdk_decoder_forward(handle, static_cast<std::int64_t>(slots.size()), slots.data(), starts.data(),
                               counts.data(), ids.data(), all.data(), logits.data()) == BDK_OK,
           "a pass");
    return logits;
  }
};

std::vector<std::int64_t> prompt(std::int64_t size, std::int64_t step) {
  std::vector<std::int64_t> ids;
  for (std::int64_t i = 0; i < size; ++i) ids.push_back((i * step + 3) % kVocabulary);
  return ids;
}

void check_model(const Example& example, int cache, const std::string& what) {
  const std::vector<std::int64_t> first = prompt(290, 5), second = prompt(37, 7);
  Decoder alone(example.model, cache);
  const std::vector<float> a = alone.forward({1}, {0}, {first}, 1), b = alone.forward({0}, {0}, {second}, 1);
  for (const std::vector<float>* logits : {&a, &b})
    for (const float logit : *logits) expect(std::isfinite(logit), what + ": a logit that is no number");

  Decoder together(example.model, cache);
  std::vector<float> both = together.forward({2, 0}, {0, 0}, {first, second}, 1);
  expect(std::memcmp(both.data(), a.data(), a.size() * 4) == 0, what + ": a long prompt beside another");
  expect(std::memcmp(both.data() + kVocabulary, b.data(), b.size() * 4) == 0, what + ": a short one beside it");
  expect(bdk_decoder_copy(together.handle, 0, 1, 30) == BDK_OK, what + ": a copy");
  for (std::size_t at = 30; at < second.size(); ++at)
    both = together.forward({1}, {static_cast<std::int64_t>(at)}, {{second[at]}}, 1);
  expect(std::memcmp(both.data(), b.data(), b.size() * 4) == 0, what + ": copied, then step by step");
}

void check_refusals(const Example& example) {
  bdk_decoder* none = nullptr;
  bdk_model wrong = example.model;
  wrong.key_heads = 4;
  expect(bdk_decoder_create(&wrong, 1, 8, BDK_CACHE_FP16, &none) == BDK_BAD_SHAPE, "heads that do not divide");
  wrong = example.model;
  wrong.ffn = kFfn + 1;
  expect(bdk_decoder_create(&wrong, 1, 8, BDK_CACHE_FP16, &none) == BDK_BAD_SHAPE, "another ffn");
  expect(bdk_decoder_create(&example.model, 1, kPositions + 1, BDK_CACHE_FP16, &none) == BDK_BAD_SHAPE, "positions");
  expect(bdk_decoder_create(&example.model, 1, 8, 2, &none) == BDK_BAD_ARGUMENT, "an unknown cache");
  expect(bdk_decoder_create(nullptr, 1, 8, BDK_CACHE_FP16, &none) == BDK_BAD_ARGUMENT, "no model");
  Decoder decoder(example.model, BDK_CACHE_FP16);
  const std::int64_t zero = 0, one = 1, outside = kVocabulary, full = kPositions;
  std::vector<float> logits(kVocabulary);
  const auto refused = [&](const std::int64_t* slot, const std::int64_t* start, const std::int64_t* count,
                           const std::int64_t* id) {
    return bdk_decoder_forward(decoder.handle, 1, slot, start, count, id, &one, logits.data()) == BDK_BAD_ARGUMENT;
  };
  const std::int64_t far = kSlots;
  expect(refused(&far, &zero, &one, &one), "a slot that is none");
  expect(refused(&zero, &full, &one, &one), "a full slot");
  expect(refused(&zero, &zero, &zero, &one), "no token");
  expect(refused(&zero, &zero, &one, &outside), "an id outside the vocabulary");
  expect(refused(&zero, &zero, &one, nullptr), "no ids");
}

}  // namespace

int main() {
  bdk_set_threads(2);
  for (int set = 0; set < bdk_instruction_set_count(); ++set) {
    if (bdk_instruction_set_choose(set) != BDK_OK) continue;
    const std::string name = bdk_instruction_set_name(set);
    for (const int cache : {BDK_CACHE_FP16, BDK_CACHE_INT8}) {
      for (const int type : {BDK_VALUE_FP32, BDK_VALUE_FP16, BDK_VALUE_BF16})
        check_model(Example(type, false, 0), cache, name + ", values of type " + std::to_string(type));
      check_model(Example(BDK_VALUE_FP16, true, 8), cache, name + ", packed, int8 activations");
      check_model(Example(BDK_VALUE_FP16, true, 0), cache, name + ", packed");
    }
  }
  check_refusals(Example(BDK_VALUE_FP16, true, 8));
  std::printf("%d checks, %d failures\n", checks, failures);
  return failures == 0 ? 0 : 1;
}
