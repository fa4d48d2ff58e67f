#include "workspace.h"

#include <algorithm>
#include <initializer_list>

namespace bdk {

bool Workspace::reserve(const bdk_model& model, std::int64_t tokens) {
  const std::int64_t queries = model.heads * model.head_size, keys = model.key_heads * model.head_size;
  const std::int64_t widest = std::max({model.hidden, queries, model.ffn});
  const struct {
    float** buffer;
    std::int64_t width;
  } wanted[] = {{&residual, model.hidden},
                {&normed, model.hidden},
                {&query, queries},
                {&key, keys},
                {&value, keys},
                {&attended, queries},
                {&gate, model.ffn},
                {&up, model.ffn},
                {&added, model.hidden},
                {&scratch, widest}};
  const auto floats = [&](std::int64_t width) { return (width * tokens + 15) / 16 * 16; };
  std::int64_t total = 0;
  for (const auto& each : wanted) total += floats(each.width);
  const std::int64_t bytes = total * static_cast<std::int64_t>(sizeof(float));
  auto* at = reinterpret_cast<float*>(memory_.reserve(static_cast<std::size_t>(bytes)));
  if (at == nullptr) return false;
  bytes_ = std::max(bytes_, bytes);
  for (const auto& each : wanted) {
    *each.buffer = at;
    at += floats(each.width);
  }
  return true;
}

}  // namespace bdk
