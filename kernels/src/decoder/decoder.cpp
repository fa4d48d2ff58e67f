#include "decoder.h"

#include <algorithm>

#include "forward.h"
#include "huge_pages.h"

namespace {

constexpr std::int64_t kPassTokens = 256;  // bounds the room for activations, and is what a product stages at a time

}  // namespace

bool bdk_decoder::prepare() {
  const auto gather = [](const bdk_linear& linear) {
    const std::int64_t width = linear.value_type == BDK_VALUE_FP32 ? 4 : 2;
    if (linear.packed == nullptr) bdk::gather_pages(linear.dense, linear.rows * linear.columns * width);
  };
  gather(model_.sizes().embedding);
  if (model_.sizes().head.dense != model_.sizes().embedding.dense) gather(model_.sizes().head);
  for (const bdk_layer& layer : model_.layers())
    for (const bdk_linear* linear :
         {&layer.query, &layer.key, &layer.value, &layer.output, &layer.gate, &layer.up, &layer.down})
      gather(*linear);
  return cache_.allocate();
}

bool bdk_decoder::in_range(const bdk::Request& request) const {
  std::int64_t tokens = 0;
  for (std::int64_t i = 0; i < request.sequences; ++i) {
    if (request.slots[i] < 0 || request.slots[i] >= cache_.slots()) return false;
    if (request.starts[i] < 0 || request.starts[i] > cache_.tokens()) return false;
    if (request.counts[i] < 1 || request.counts[i] > cache_.tokens() - request.starts[i]) return false;
    if (request.wanted[i] < 0 || request.wanted[i] > request.counts[i]) return false;
    tokens += request.counts[i];
  }
  for (std::int64_t token = 0; token < tokens; ++token)
    if (request.ids[token] < 0 || request.ids[token] >= model_.sizes().vocabulary) return false;
  return true;
}

int bdk_decoder::forward(const bdk::Request& request) {
  if (!in_range(request)) return BDK_BAD_ARGUMENT;
  const std::int64_t* ids = request.ids;
  float* logits = request.logits;
  batch_.clear();
  wanted_rows_.clear();
  for (std::int64_t i = 0; i < request.sequences; ++i) {
    for (std::int64_t done = 0; done < request.counts[i];) {
      const std::int64_t row = bdk::tokens_of(batch_);
      const std::int64_t here = std::min(request.counts[i] - done, kPassTokens - row);
      batch_.push_back({request.slots[i], request.starts[i] + done, here, row});
      const std::int64_t unwanted = std::max<std::int64_t>(request.counts[i] - request.wanted[i] - done, 0);
      for (std::int64_t token = unwanted; token < here; ++token) wanted_rows_.push_back(row + token);
      done += here;
      if (row + here < kPassTokens) continue;
      const int status = run(ids, &logits);
      if (status != BDK_OK) return status;
      ids += kPassTokens;
    }
  }
  return batch_.empty() ? BDK_OK : run(ids, &logits);
}

int bdk_decoder::copy(std::int64_t from, std::int64_t to, std::int64_t tokens) {
  const auto exists = [&](std::int64_t slot) { return slot >= 0 && slot < cache_.slots(); };
  if (!exists(from) || !exists(to) || tokens < 0 || tokens > cache_.tokens()) return BDK_BAD_ARGUMENT;
  for (std::int64_t layer = 0; layer < model_.sizes().layer_count; ++layer) cache_.copy(layer, from, to, tokens);
  return BDK_OK;
}

int bdk_decoder::run(const std::int64_t* ids, float** logits) {
  if (!workspace_.reserve(model_.sizes(), bdk::tokens_of(batch_))) return BDK_NO_MEMORY;
  int status = bdk::run_layers(model_, cache_, batch_, ids, &workspace_);
  if (status == BDK_OK && !wanted_rows_.empty()) {
    status = bdk::write_logits(model_, wanted_rows_, &workspace_, *logits);
    *logits += static_cast<std::int64_t>(wanted_rows_.size()) * model_.sizes().vocabulary;
  }
  batch_.clear();
  wanted_rows_.clear();
  return status;
}
