#include "forward.h"

#include <cstring>

#include "attention.h"
#include "linear.h"
#include "thread_pool.h"
#include "vector_ops.h"

namespace bdk {
namespace {

constexpr std::int64_t kGateWork = 16;  // multiply-adds that one gate costs

class Pass {
 public:
  Pass(const Model& model, const KvCache& cache, const Batch& batch, Activations* activations)
      : model_(model), sizes_(model.sizes()), cache_(cache), batch_(batch), at_(*activations) {}

  void embed(const std::int64_t* ids) {
    const std::int64_t width = sizes_.embedding.value_type == BDK_VALUE_FP32 ? 4 : 2;
    const auto type = static_cast<bdk_value_type>(sizes_.embedding.value_type);
    const auto* table = static_cast<const std::uint8_t*>(sizes_.embedding.dense);
    const std::int64_t size = sizes_.hidden;
    for (std::int64_t token = 0; token < tokens_; ++token)
      vector_ops().widen(type, table + ids[token] * size * width, size, sizes_.embedding_scale,
                         at_.residual + token * size);
  }

  int attention(std::int64_t index) {
    const bdk_layer& layer = model_.layers()[static_cast<std::size_t>(index)];
    norm(at_.residual, layer.attention_norm, at_.normed);
    int status = apply(layer.query, at_.normed, at_.query);
    if (status == BDK_OK) status = apply(layer.key, at_.normed, at_.key);
    if (status == BDK_OK) status = apply(layer.value, at_.normed, at_.value);
    if (status == BDK_OK)
      status = attend_layer(model_, cache_, index, batch_, at_.query, at_.key, at_.value, at_.attended);
    if (status == BDK_OK) status = apply(layer.output, at_.attended, at_.added);
    if (status == BDK_OK) add(layer.attention_out_norm);
    return status;
  }

  int mlp(std::int64_t index) {
    const bdk_layer& layer = model_.layers()[static_cast<std::size_t>(index)];
    norm(at_.residual, layer.ffn_norm, at_.normed);
    int status = apply(layer.gate, at_.normed, at_.gate);
    if (status == BDK_OK) status = apply(layer.up, at_.normed, at_.up);
    if (status != BDK_OK) return status;
    const std::int64_t size = tokens_ * sizes_.ffn;
    parallel(size, size * kGateWork, [&](std::int64_t begin, std::int64_t end) {
      vector_ops().gate(static_cast<bdk_activation>(sizes_.activation), at_.gate + begin, at_.up + begin, end - begin);
    });
    status = apply(layer.down, at_.gate, at_.added);
    if (status == BDK_OK) add(layer.ffn_out_norm);
    return status;
  }

 private:
  void norm(const float* x, const float* gain, float* out) {
    norm_tokens(x, tokens_, sizes_.hidden, gain, sizes_.norm_eps, out);
  }

  int apply(const bdk_linear& linear, const float* x, float* y) {
    return apply_linear(linear, x, tokens_, at_.scratch, y);
  }

  // Adds what a block gave to the residual stream, normed first where the family does so.
  void add(const float* gain) {
    if (gain != nullptr) norm(at_.added, gain, at_.added);
    const std::int64_t size = tokens_ * sizes_.hidden;
    parallel(size, size, [&](std::int64_t begin, std::int64_t end) {
      vector_ops().add(at_.residual + begin, at_.added + begin, end - begin);
    });
  }

  const Model& model_;
  const bdk_model& sizes_;
  const KvCache& cache_;
  const Batch& batch_;
  Activations& at_;
  std::int64_t tokens_ = tokens_of(batch_);
};

}  // namespace

int run_layers(const Model& model, const KvCache& cache, const Batch& batch, const std::int64_t* ids,
               Activations* activations) {
  Pass pass(model, cache, batch, activations);
  pass.embed(ids);
  for (std::int64_t layer = 0; layer < model.sizes().layer_count; ++layer) {
    int status = pass.attention(layer);
    if (status == BDK_OK) status = pass.mlp(layer);
    if (status != BDK_OK) return status;
  }
  return BDK_OK;
}

int write_logits(const Model& model, const std::vector<std::int64_t>& rows, Activations* activations, float* logits) {
  const bdk_model& sizes = model.sizes();
  const auto count = static_cast<std::int64_t>(rows.size());
  for (std::int64_t index = 0; index < count; ++index)
    vector_ops().rms_norm(activations->residual + rows[static_cast<std::size_t>(index)] * sizes.hidden, sizes.last_norm,
                          sizes.hidden, sizes.norm_eps, activations->normed + index * sizes.hidden);
  const int status = apply_linear(sizes.head, activations->normed, count, activations->scratch, logits);
  if (status != BDK_OK || !(sizes.soft_cap > 0.0f)) return status;
  const std::int64_t size = count * sizes.vocabulary;
  parallel(size, size * kGateWork, [&](std::int64_t begin, std::int64_t end) {
    vector_ops().soft_cap(logits + begin, end - begin, sizes.soft_cap);
  });
  return BDK_OK;
}

}  // namespace bdk
