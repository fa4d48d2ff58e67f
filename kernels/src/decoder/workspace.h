// Room for the activations of one pass; it grows to the longest pass so far and stays.
#pragma once

#include "aligned.h"
#include "bitdistill_decoder.h"

namespace bdk {

// Rows of every buffer are tokens; the sizes of a row are beside them.
struct Workspace {
  float* residual;  // hidden
  float* normed;    // hidden
  float* query;     // heads x size
  float* key;       // key heads x size
  float* value;     // key heads x size
  float* attended;  // heads x size
  float* gate;      // ffn
  float* up;        // ffn
  float* added;     // hidden
  float* scratch;   // the widest input of a linear

  // False where memory is short.
  bool reserve(const bdk_model& model, std::int64_t tokens);
  std::int64_t bytes() const { return bytes_; }

 private:
  Scratch memory_;
  std::int64_t bytes_ = 0;
};

}  // namespace bdk
