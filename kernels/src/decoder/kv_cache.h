// Keys and values of every slot, layer and head; memory is touched only as far as sequences have grown.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>

#include "vector_ops.h"

namespace bdk {

class KvCache {
 public:
  KvCache(const bdk_model& model, std::int64_t slots, std::int64_t tokens, bdk_cache_type type);

  // False where memory is short.
  bool allocate();
  std::int64_t bytes() const { return heads_ * head_bytes_; }
  std::int64_t slots() const { return slots_; }
  std::int64_t tokens() const { return tokens_; }
  // The first `tokens` tokens of a layer, from one slot to another.
  void copy(std::int64_t layer, std::int64_t from, std::int64_t to, std::int64_t tokens) const;
  CachedHead head(std::int64_t layer, std::int64_t slot, std::int64_t key_head) const;

 private:
  struct Free {
    void operator()(std::uint8_t* memory) const { std::free(memory); }
  };

  bdk_cache_type type_;
  std::int64_t slots_, tokens_, key_heads_, head_size_, heads_;
  std::int64_t value_stride_, keys_bytes_, values_bytes_, scales_bytes_, head_bytes_;
  std::unique_ptr<std::uint8_t, Free> memory_;
  std::uint8_t* first_ = nullptr;
};

}  // namespace bdk
