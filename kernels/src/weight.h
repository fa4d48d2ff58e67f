// A weight in the kernels' layout, made from the canonical bytes.
#pragma once

#include <cstdint>

#include "bitdistill_kernels.h"
#include "layout.h"
#include "weight_memory.h"

struct bdk_weight {
  bdk::TileLayout layout;
  std::int64_t rows = 0;
  std::int64_t group_size = 0;  // 0: a scale per row or tensor
  std::int64_t tiles = 0;
  std::int64_t tile_bytes = 0;
  bdk::WeightBytes bytes;

  const std::uint8_t* tile(std::int64_t index) const { return bytes.get() + index * tile_bytes; }
};

namespace bdk {

// Checks every enum, size and code, then repacks.  A status of enum bdk_status; *weight is set on BDK_OK only.
int create_weight(const bdk_weight_description& description, bdk_weight** weight);

}  // namespace bdk
