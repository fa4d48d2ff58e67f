// Attention of one layer: queries and keys are normed and turned, keys and values cached, and the cache is read.
#pragma once

#include "batch.h"
#include "kv_cache.h"
#include "model.h"

namespace bdk {

// query [tokens, heads x size] is overwritten on the way; out has its shape.  A status of enum bdk_status.
int attend_layer(const Model& model, const KvCache& cache, std::int64_t layer, const Batch& batch, float* query,
                 float* key, const float* value, float* out);

}  // namespace bdk
