// A small pool of threads that stay: a decoder multiplies a few hundred matrices per token, each in tens of
// microseconds, so starting threads, or sleeping between two products, would cost more than it saves.
#pragma once

#include <cstdint>
#include <type_traits>

namespace bdk {

using RangeTask = void (*)(void* context, std::int64_t begin, std::int64_t end);

// Runs task over [0, items), cut into one contiguous range for each thread, and returns when all is done.  `work` is
// roughly the number of multiply-adds: too little of it stays on the calling thread, as it does where another caller
// holds the pool.
void run_parallel(std::int64_t items, std::int64_t work, RangeTask task, void* context);

// The same for a callable (begin, end).
template <typename Callable>
void parallel(std::int64_t items, std::int64_t work, Callable&& callable) {
  using Plain = std::remove_reference_t<Callable>;
  run_parallel(
      items, work,
      [](void* context, std::int64_t begin, std::int64_t end) { (*static_cast<Plain*>(context))(begin, end); },
      &callable);
}

int threads();

// False where the threads could not be started; the number is then what it was.
bool set_threads(int count);

}  // namespace bdk
