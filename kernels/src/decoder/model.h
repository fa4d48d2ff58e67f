// The description of a model, copied and checked.
#pragma once

#include <cstdint>
#include <vector>

#include "bitdistill_decoder.h"

namespace bdk {

class Model {
 public:
  // BDK_OK where every size fits every other; a status of enum bdk_status otherwise.
  static int check(const bdk_model& description);

  explicit Model(const bdk_model& description)
      : description_(description), layers_(description.layers, description.layers + description.layer_count) {
    description_.layers = layers_.data();
  }
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;

  const bdk_model& sizes() const { return description_; }
  const std::vector<bdk_layer>& layers() const { return layers_; }

  const float* cosines(std::int64_t rope, std::int64_t position) const {
    return description_.cosines + (rope * description_.positions + position) * (description_.head_size / 2);
  }
  const float* sines(std::int64_t rope, std::int64_t position) const {
    return description_.sines + (rope * description_.positions + position) * (description_.head_size / 2);
  }

 private:
  bdk_model description_;
  std::vector<bdk_layer> layers_;
};

}  // namespace bdk
