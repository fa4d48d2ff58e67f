// The forward pass: from token ids to logits, layer by layer, over one batch.
#pragma once

#include <cstdint>
#include <vector>

#include "batch.h"
#include "kv_cache.h"
#include "model.h"
#include "workspace.h"

namespace bdk {

// Runs the batch through all layers; workspace->residual holds the last hidden states [tokens, hidden] then.
int run_layers(const Model& model, const KvCache& cache, const Batch& batch, const std::int64_t* ids,
               Workspace* workspace);

// Logits [rows, vocabulary] after the rows of the pass that `rows` names.
int write_logits(const Model& model, const std::vector<std::int64_t>& rows, Workspace* workspace, float* logits);

}  // namespace bdk
