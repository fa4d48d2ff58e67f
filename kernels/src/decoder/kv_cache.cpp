#include "kv_cache.h"

#include <cstring>

namespace bdk {
namespace {

constexpr std::int64_t kLine = 64;

std::int64_t round_up(std::int64_t value, std::int64_t to) { return (value + to - 1) / to * to; }

}  // namespace

KvCache::KvCache(const bdk_model& model, std::int64_t slots, std::int64_t tokens, bdk_cache_type type)
    : type_(type),
      slots_(slots),
      tokens_(tokens),
      key_heads_(model.key_heads),
      head_size_(model.head_size),
      heads_(model.layer_count * slots * model.key_heads),
      value_stride_(round_up(model.head_size, kHeadAlignment)) {
  const std::int64_t room = round_up(tokens, kKeyBlock);
  const std::int64_t width = type == BDK_CACHE_INT8 ? 1 : 2;
  keys_bytes_ = round_up(room * head_size_ * width, kLine);
  values_bytes_ = round_up(room * value_stride_ * width, kLine);
  scales_bytes_ = type == BDK_CACHE_INT8 ? round_up(room * static_cast<std::int64_t>(sizeof(float)), kLine) : 0;
  head_bytes_ = keys_bytes_ + values_bytes_ + 2 * scales_bytes_;
}

bool KvCache::allocate() {
  // calloc gives pages that take no memory before they are written
  memory_.reset(static_cast<std::uint8_t*>(std::calloc(static_cast<std::size_t>(bytes() + kLine), 1)));
  if (!memory_) return false;
  first_ = memory_.get() + (kLine - reinterpret_cast<std::uintptr_t>(memory_.get()) % kLine) % kLine;
  return true;
}

void KvCache::copy(std::int64_t layer, std::int64_t from, std::int64_t to, std::int64_t tokens) const {
  if (from == to) return;
  const std::int64_t width = type_ == BDK_CACHE_INT8 ? 1 : 2, room = round_up(tokens, kKeyBlock);
  const auto bytes = [](std::int64_t count) { return static_cast<std::size_t>(count); };
  for (std::int64_t key_head = 0; key_head < key_heads_; ++key_head) {
    const CachedHead source = head(layer, from, key_head), target = head(layer, to, key_head);
    std::memcpy(target.keys, source.keys, bytes(room * head_size_ * width));
    std::memcpy(target.values, source.values, bytes(tokens * value_stride_ * width));
    if (scales_bytes_ == 0) continue;
    std::memcpy(target.key_scales, source.key_scales, bytes(tokens) * sizeof(float));
    std::memcpy(target.value_scales, source.value_scales, bytes(tokens) * sizeof(float));
  }
}

CachedHead KvCache::head(std::int64_t layer, std::int64_t slot, std::int64_t key_head) const {
  std::uint8_t* at = first_ + ((layer * slots_ + slot) * key_heads_ + key_head) * head_bytes_;
  std::uint8_t* scales = at + keys_bytes_ + values_bytes_;
  return {type_,
          head_size_,
          value_stride_,
          at,
          at + keys_bytes_,
          reinterpret_cast<float*>(scales),
          reinterpret_cast<float*>(scales + scales_bytes_)};
}

}  // namespace bdk
