// Memory in which weights lie beside each other on huge pages.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace bdk {

class WeightChunk;

struct WeightFree {
  WeightChunk* chunk = nullptr;  // null: memory of its own
  void operator()(std::uint8_t* memory) const;
};
using WeightBytes = std::unique_ptr<std::uint8_t[], WeightFree>;

// Zeros, aligned to a cache line; null where memory is short.  May be called from any thread.
WeightBytes allocate_weight(std::size_t bytes);

}  // namespace bdk
