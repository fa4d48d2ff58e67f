#include "forward.h"

#include "attention.h"
#include "linear.h"
#include "rows.h"
#include "thread_pool.h"
#include "vector_ops.h"

namespace bdk {
namespace {

constexpr std::int64_t kGateWork = 16;  // multiply-adds that one gate costs

class Pass {
 public:
  Pass(const Model& model, const KvCache& cache, const Batch& batch, Workspace* workspace)
      : model_(model), sizes_(model.sizes()), cache_(cache), batch_(batch), at_(*workspace) {}

  void embed(const std::int64_t* ids) {
    const bdk_linear& table = sizes_.embedding;
    const std::int64_t size = sizes_.hidden;
    if (table.packed != nullptr) {
      dequantize_rows(*table.packed, ids, tokens_, at_.residual);
      vector_ops().widen(BDK_VALUE_FP32, at_.residual, tokens_ * size, sizes_.embedding_scale, at_.residual);
      return;
    }
    const auto* values = static_cast<const std::uint8_t*>(table.dense);
    const std::int64_t row_bytes = size * (table.value_type == BDK_VALUE_FP32 ? 4 : 2);
    for (std::int64_t token = 0; token < tokens_; ++token)
      vector_ops().widen(static_cast<bdk_value_type>(table.value_type), values + ids[token] * row_bytes, size,
                         sizes_.embedding_scale, at_.residual + token * size);
  }

  int attention(std::int64_t index) {
    const bdk_layer& layer = model_.layers()[static_cast<std::size_t>(index)];
    norm(at_.residual, layer.attention_norm, at_.normed);
    int status = apply({{layer.query, at_.query}, {layer.key, at_.key}, {layer.value, at_.value}}, at_.normed);
    if (status == BDK_OK)
      status = attend_layer(model_, cache_, index, batch_, at_.query, at_.key, at_.value, at_.attended);
    if (status == BDK_OK) status = apply({{layer.output, at_.added}}, at_.attended);
    if (status == BDK_OK) add(layer.attention_out_norm);
    return status;
  }

  int mlp(std::int64_t index) {
    const bdk_layer& layer = model_.layers()[static_cast<std::size_t>(index)];
    norm(at_.residual, layer.ffn_norm, at_.normed);
    int status = apply({{layer.gate, at_.gate}, {layer.up, at_.up}}, at_.normed);
    if (status != BDK_OK) return status;
    const std::int64_t size = tokens_ * sizes_.ffn;
    parallel(size, size * kGateWork, [&](std::int64_t begin, std::int64_t end) {
      vector_ops().gate(static_cast<bdk_activation>(sizes_.activation), at_.gate + begin, at_.up + begin, end - begin);
    });
    status = apply({{layer.down, at_.added}}, at_.gate);
    if (status == BDK_OK) add(layer.ffn_out_norm);
    return status;
  }

 private:
  void norm(const float* x, const float* gain, float* out) {
    norm_tokens(x, tokens_, sizes_.hidden, gain, sizes_.norm_eps, out);
  }

  int apply(std::initializer_list<LinearOutput> outputs, const float* x) {
    return apply_linears(outputs, x, tokens_, at_.scratch);
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
  Workspace& at_;
  std::int64_t tokens_ = tokens_of(batch_);
};

}  // namespace

int run_layers(const Model& model, const KvCache& cache, const Batch& batch, const std::int64_t* ids,
               Workspace* workspace) {
  Pass pass(model, cache, batch, workspace);
  pass.embed(ids);
  for (std::int64_t layer = 0; layer < model.sizes().layer_count; ++layer) {
    int status = pass.attention(layer);
    if (status == BDK_OK) status = pass.mlp(layer);
    if (status != BDK_OK) return status;
  }
  return BDK_OK;
}

int write_logits(const Model& model, const std::vector<std::int64_t>& rows, Workspace* workspace, float* logits) {
  const bdk_model& sizes = model.sizes();
  const auto count = static_cast<std::int64_t>(rows.size());
  for (std::int64_t index = 0; index < count; ++index)
    vector_ops().rms_norm(workspace->residual + rows[static_cast<std::size_t>(index)] * sizes.hidden, sizes.last_norm,
                          sizes.hidden, sizes.norm_eps, workspace->normed + index * sizes.hidden);
  const int status = apply_linears({{sizes.head, logits}}, workspace->normed, count, workspace->scratch);
  if (status != BDK_OK || !(sizes.soft_cap > 0.0f)) return status;
  const std::int64_t size = count * sizes.vocabulary;
  parallel(size, size * kGateWork, [&](std::int64_t begin, std::int64_t end) {
    vector_ops().soft_cap(logits + begin, end - begin, sizes.soft_cap);
  });
  return BDK_OK;
}

}  // namespace bdk
