// Memory aligned to a cache line, for what is computed with for a moment.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

#include "layout.h"

namespace bdk {

struct AlignedDelete {
  void operator()(std::uint8_t* memory) const { ::operator delete(memory, std::align_val_t{kAlignment}); }
};
using AlignedBytes = std::unique_ptr<std::uint8_t[], AlignedDelete>;

// Null where memory is short.
inline AlignedBytes allocate_aligned(std::size_t bytes) {
  void* memory = ::operator new(bytes, std::align_val_t{kAlignment}, std::nothrow);
  return AlignedBytes(static_cast<std::uint8_t*>(memory));
}

// Grows and never shrinks: one per thread, for staged activations.
class Scratch {
 public:
  // Null where memory is short; what was there before is lost.
  std::uint8_t* reserve(std::size_t bytes) {
    if (bytes > bytes_) {
      memory_ = nullptr;
      memory_ = allocate_aligned(bytes);
      bytes_ = memory_ ? bytes : 0;
    }
    return memory_.get();
  }

 private:
  AlignedBytes memory_;
  std::size_t bytes_ = 0;
};

}  // namespace bdk
