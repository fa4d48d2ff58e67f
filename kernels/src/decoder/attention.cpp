#include "attention.h"

#include <atomic>

#include "aligned.h"
#include "thread_pool.h"

namespace bdk {
namespace {

// Norms, rotates and caches what the projections gave.
void place_heads(const Model& model, const KvCache& cache, std::int64_t layer_index, const Batch& batch, float* query,
                 float* key, const float* value) {
  const bdk_model& sizes = model.sizes();
  const bdk_layer& layer = model.layers()[static_cast<std::size_t>(layer_index)];
  const std::int64_t size = sizes.head_size, heads = sizes.heads, key_heads = sizes.key_heads;
  const std::int64_t tokens = tokens_of(batch);
  const VectorOps& ops = vector_ops();
  parallel(tokens, tokens * (heads + 2 * key_heads) * size * 2, [&](std::int64_t begin, std::int64_t end) {
    for_rows(batch, begin, end, [&](const Piece& piece, std::int64_t row, std::int64_t position) {
      const float* cosine = model.cosines(layer.rope, position);
      const float* sine = model.sines(layer.rope, position);
      const auto place = [&](float* head, const float* gain) {
        if (gain != nullptr) ops.rms_norm(head, gain, size, sizes.norm_eps, head);
        ops.rotate(head, cosine, sine, size / 2);
      };
      for (std::int64_t head = 0; head < heads; ++head) place(query + (row * heads + head) * size, layer.query_norm);
      for (std::int64_t head = 0; head < key_heads; ++head) {
        const std::int64_t at = (row * key_heads + head) * size;
        place(key + at, layer.key_norm);
        ops.append(cache.head(layer_index, piece.slot, head), position, key + at, value + at);
      }
    });
  });
}

// The queries of one piece that share a key-value head, kAttentionRows at a time.
struct Tiles {
  const bdk_model& sizes;
  const Piece& piece;

  std::int64_t group() const { return sizes.heads / sizes.key_heads; }
  std::int64_t per_head() const { return (piece.count * group() + kAttentionRows - 1) / kAttentionRows; }
  std::int64_t count() const { return per_head() * sizes.key_heads; }

  void attend(const VectorOps& ops, const KvCache& cache, std::int64_t layer_index, std::int64_t window,
              std::int64_t index, const float* query, float* out, float* scores) const {
    const std::int64_t key_head = index / per_head(), first = index % per_head() * kAttentionRows;
    AttentionTile tile;
    tile.cache = cache.head(layer_index, piece.slot, key_head);
    tile.scale = sizes.attention_scale;
    tile.scores = scores;
    tile.scores_stride = scores_stride(cache);
    tile.rows = 0;
    for (std::int64_t at = first; at < first + kAttentionRows && at < piece.count * group(); ++at) {
      const std::int64_t token = at / group(), head = key_head * group() + at % group();
      const std::int64_t offset = ((piece.row + token) * sizes.heads + head) * sizes.head_size;
      const std::int64_t end = piece.start + token + 1;
      tile.query[tile.rows] = query + offset;
      tile.out[tile.rows] = out + offset;
      tile.begin[tile.rows] = window > 0 && end > window ? end - window : 0;
      tile.end[tile.rows] = end;
      ++tile.rows;
    }
    ops.attend(tile);
  }

  static std::int64_t scores_stride(const KvCache& cache) {
    return (cache.tokens() + 2 * kKeyBlock - 1) / kKeyBlock * kKeyBlock;
  }
};

float* reserve_scores(const KvCache& cache) {
  static thread_local Scratch scratch;
  const std::int64_t floats = kAttentionRows * Tiles::scores_stride(cache);
  return reinterpret_cast<float*>(scratch.reserve(static_cast<std::size_t>(floats) * sizeof(float)));
}

}  // namespace

int attend_layer(const Model& model, const KvCache& cache, std::int64_t layer, const Batch& batch, float* query,
                 float* key, const float* value, float* out) {
  place_heads(model, cache, layer, batch, query, key, value);
  const bdk_model& sizes = model.sizes();
  const std::int64_t window = model.layers()[static_cast<std::size_t>(layer)].window;
  std::int64_t tiles = 0, seen = 0;
  for (const Piece& piece : batch) {
    tiles += Tiles{sizes, piece}.count();
    seen += piece.count * (piece.start + piece.count);
  }
  const VectorOps& ops = vector_ops();
  std::atomic<bool> short_of_memory{false};
  parallel(tiles, seen * sizes.heads * sizes.head_size * 2, [&](std::int64_t begin, std::int64_t end) {
    float* scores = reserve_scores(cache);
    if (scores == nullptr) {
      short_of_memory.store(true);
      return;
    }
    std::int64_t before = 0;
    for (const Piece& piece : batch) {
      const Tiles of{sizes, piece};
      const std::int64_t first = begin > before ? begin - before : 0;
      const std::int64_t last = end - before < of.count() ? end - before : of.count();
      for (std::int64_t index = first; index < last; ++index)
        of.attend(ops, cache, layer, window, index, query, out, scores);
      before += of.count();
    }
  });
  return short_of_memory.load() ? BDK_NO_MEMORY : BDK_OK;
}

}  // namespace bdk
