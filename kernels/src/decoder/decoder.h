// A model with its cache: cuts what is asked for into passes of bounded size.
#pragma once

#include <cstdint>
#include <vector>

#include "batch.h"
#include "kv_cache.h"
#include "model.h"
#include "workspace.h"

namespace bdk {

// What bdk_decoder_forward is asked.
struct Request {
  std::int64_t sequences;
  const std::int64_t* slots;
  const std::int64_t* starts;
  const std::int64_t* counts;
  const std::int64_t* ids;
  const std::int64_t* wanted;
  float* logits;
};

}  // namespace bdk

struct bdk_decoder {
 public:
  bdk_decoder(const bdk_model& model, std::int64_t slots, std::int64_t tokens, bdk_cache_type type)
      : model_(model), cache_(model_.sizes(), slots, tokens, type) {}

  // False where memory is short.
  bool prepare();
  // A status of enum bdk_status; nothing is computed where a number is out of range.
  int forward(const bdk::Request& request);
  int copy(std::int64_t from, std::int64_t to, std::int64_t tokens);
  std::int64_t cache_bytes() const { return cache_.bytes(); }
  std::int64_t scratch_bytes() const { return workspace_.bytes(); }

 private:
  bool in_range(const bdk::Request& request) const;
  int run(const std::int64_t* ids, float** logits);

  bdk::Model model_;
  bdk::KvCache cache_;
  bdk::Workspace workspace_;
  bdk::Batch batch_;
  std::vector<std::int64_t> wanted_rows_;
};
