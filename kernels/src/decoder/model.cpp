#include "model.h"

#include "linear.h"

namespace bdk {
namespace {

constexpr std::int64_t kMost = std::int64_t{1} << 24;  // of any one size: products of two stay far from overflow

bool within(std::int64_t value, std::int64_t least = 1) { return value >= least && value <= kMost; }

bool layer_fits(const bdk_model& model, const bdk_layer& layer) {
  const std::int64_t queries = model.heads * model.head_size, keys = model.key_heads * model.head_size;
  return linear_fits(layer.query, queries, model.hidden) && linear_fits(layer.key, keys, model.hidden) &&
         linear_fits(layer.value, keys, model.hidden) && linear_fits(layer.output, model.hidden, queries) &&
         linear_fits(layer.gate, model.ffn, model.hidden) && linear_fits(layer.up, model.ffn, model.hidden) &&
         linear_fits(layer.down, model.hidden, model.ffn) && layer.attention_norm != nullptr &&
         layer.ffn_norm != nullptr && layer.window >= 0 && layer.rope >= 0 && layer.rope < model.rope_count;
}

}  // namespace

int Model::check(const bdk_model& model) {
  for (const std::int64_t size : {model.hidden, model.heads, model.key_heads, model.head_size, model.ffn,
                                  model.vocabulary, model.layer_count, model.rope_count, model.positions})
    if (!within(size)) return BDK_BAD_SHAPE;
  if (model.heads % model.key_heads != 0 || model.head_size % 2 != 0) return BDK_BAD_SHAPE;
  if (model.layers == nullptr || model.last_norm == nullptr || model.cosines == nullptr || model.sines == nullptr)
    return BDK_BAD_ARGUMENT;
  if (model.activation != BDK_SILU && model.activation != BDK_GELU_TANH) return BDK_BAD_ARGUMENT;
  if (!linear_fits(model.embedding, model.vocabulary, model.hidden)) return BDK_BAD_SHAPE;
  if (!linear_fits(model.head, model.vocabulary, model.hidden)) return BDK_BAD_SHAPE;
  for (std::int64_t index = 0; index < model.layer_count; ++index)
    if (!layer_fits(model, model.layers[index])) return BDK_BAD_SHAPE;
  return BDK_OK;
}

}  // namespace bdk
