// The decoder's C ABI: argument checks, and nothing that throws past it.
#include <memory>
#include <new>

#include "decoder.h"

namespace {

constexpr double kMostBytes = 1e15;  // of a cache: far from what overflows

bool cache_fits(const bdk_model& model, int64_t slots, int64_t tokens) {
  const double heads = static_cast<double>(model.layer_count) * static_cast<double>(model.key_heads);
  const double head = (static_cast<double>(tokens) + 64) * (static_cast<double>(model.head_size) + 64);
  return static_cast<double>(slots) * heads * head * 4 < kMostBytes;
}

}  // namespace

int bdk_decoder_create(const bdk_model* model, int64_t slots, int64_t slot_tokens, int32_t cache_type,
                       bdk_decoder** decoder) {
  if (model == nullptr || decoder == nullptr) return BDK_BAD_ARGUMENT;
  if (cache_type != BDK_CACHE_FP16 && cache_type != BDK_CACHE_INT8) return BDK_BAD_ARGUMENT;
  const int status = bdk::Model::check(*model);
  if (status != BDK_OK) return status;
  if (slots < 1 || slot_tokens < 1 || slot_tokens > model->positions) return BDK_BAD_SHAPE;
  if (!cache_fits(*model, slots, slot_tokens)) return BDK_NO_MEMORY;
  try {
    auto made = std::make_unique<bdk_decoder>(*model, slots, slot_tokens, static_cast<bdk_cache_type>(cache_type));
    if (!made->prepare()) return BDK_NO_MEMORY;
    *decoder = made.release();
    return BDK_OK;
  } catch (const std::bad_alloc&) {
    return BDK_NO_MEMORY;
  }
}

void bdk_decoder_free(bdk_decoder* decoder) { delete decoder; }

int64_t bdk_decoder_cache_bytes(const bdk_decoder* decoder) { return decoder == nullptr ? 0 : decoder->cache_bytes(); }

int64_t bdk_decoder_scratch_bytes(const bdk_decoder* decoder) {
  return decoder == nullptr ? 0 : decoder->scratch_bytes();
}

int bdk_decoder_forward(bdk_decoder* decoder, int64_t sequences, const int64_t* slots, const int64_t* starts,
                        const int64_t* counts, const int64_t* ids, const int64_t* wanted, float* logits) {
  if (decoder == nullptr || sequences < 0) return BDK_BAD_ARGUMENT;
  if (sequences == 0) return BDK_OK;
  if (slots == nullptr || starts == nullptr || counts == nullptr || ids == nullptr || wanted == nullptr)
    return BDK_BAD_ARGUMENT;
  if (logits == nullptr)
    for (int64_t i = 0; i < sequences; ++i)
      if (wanted[i] != 0) return BDK_BAD_ARGUMENT;
  try {
    return decoder->forward({sequences, slots, starts, counts, ids, wanted, logits});
  } catch (const std::bad_alloc&) {
    return BDK_NO_MEMORY;
  }
}

int bdk_decoder_copy(bdk_decoder* decoder, int64_t from, int64_t to, int64_t tokens) {
  return decoder == nullptr ? BDK_BAD_ARGUMENT : decoder->copy(from, to, tokens);
}
