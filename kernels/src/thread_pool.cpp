// Workers spin for a moment after a task, because in decoding the next one follows at once, and then sleep.
//
// One mutex admits one caller; a second caller does its work alone instead of waiting.  A child made by fork() has no
// workers: it drops the parent's pool unread and starts its own.
#include "thread_pool.h"

#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace bdk {
namespace {

constexpr std::int64_t kMinWorkPerThread = 1 << 17;
constexpr int kSpins = 4000;  // some tens of microseconds
constexpr int kMaxThreads = 1024;

void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class ThreadPool {
 public:
  explicit ThreadPool(int count) {
    try {
      for (int index = 1; index < count; ++index) workers_.emplace_back([this, index] { work(index); });
    } catch (const std::system_error&) {
      stop();
      throw;
    }
  }
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;
  ~ThreadPool() { stop(); }

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  void run(std::int64_t items, int parts, RangeTask task, void* context) {
    items_ = items;
    parts_ = parts;
    task_ = task;
    context_ = context;
    busy_.store(static_cast<int>(workers_.size()));
    epoch_.fetch_add(1);
    if (sleepers_.load() > 0) {
      std::lock_guard<std::mutex> lock(mutex_);
      wake_.notify_all();
    }
    run_part(0);
    for (int spins = 0; busy_.load() > 0; ++spins) {
      relax();
      if (spins > kSpins) std::this_thread::yield();
    }
  }

 private:
  void run_part(int part) {
    if (part < parts_) task_(context_, items_ * part / parts_, items_ * (part + 1) / parts_);
  }

  void work(int index) {
    for (std::uint64_t seen = 0;;) {
      for (int spins = 0; epoch_.load() == seen && spins < kSpins; ++spins) relax();
      if (epoch_.load() == seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        sleepers_.fetch_add(1);
        wake_.wait(lock, [&] { return epoch_.load() != seen; });
        sleepers_.fetch_sub(1);
      }
      seen = epoch_.load();
      if (stopping_) return;
      run_part(index);
      busy_.fetch_sub(1);
    }
  }

  void stop() {
    stopping_ = true;
    epoch_.fetch_add(1);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      wake_.notify_all();
    }
    for (std::thread& worker : workers_) worker.join();
  }

  // Written by the caller before epoch_ moves, read by the workers after it has.
  std::int64_t items_ = 0;
  int parts_ = 0;
  RangeTask task_ = nullptr;
  void* context_ = nullptr;
  bool stopping_ = false;

  std::atomic<std::uint64_t> epoch_{0};
  std::atomic<int> busy_{0};
  std::atomic<int> sleepers_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> workers_;
};

int usable_processors() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
  const unsigned count = std::thread::hardware_concurrency();
  return count == 0 ? 1 : static_cast<int>(count);
}

// The process's pool, and what guards it.  Never destroyed: threads may outlive static destructors.
struct Shared {
  std::mutex mutex;
  ThreadPool* pool = nullptr;  // made when first needed
  std::atomic<int> wanted{usable_processors()};
};

std::atomic<Shared*> shared_state{nullptr};

#if defined(__unix__) || defined(__APPLE__)
void forget_pool_after_fork() {
  // The parent's workers do not exist here, and its mutex may be locked for ever: leave both and start afresh.
  const Shared* old = shared_state.load();
  Shared* fresh = new Shared;
  if (old != nullptr) fresh->wanted.store(old->wanted.load());
  shared_state.store(fresh);
}
#endif

Shared& shared() {
  static const bool made = [] {
    shared_state.store(new Shared);
#if defined(__unix__) || defined(__APPLE__)
    pthread_atfork(nullptr, nullptr, forget_pool_after_fork);
#endif
    return true;
  }();
  static_cast<void>(made);
  return *shared_state.load();
}

}  // namespace

void run_parallel(std::int64_t items, std::int64_t work, RangeTask task, void* context) {
  Shared& state = shared();
  std::int64_t parts = state.wanted.load();
  parts = parts < items ? parts : items;
  parts = parts < work / kMinWorkPerThread ? parts : work / kMinWorkPerThread;
  if (parts > 1) {
    std::unique_lock<std::mutex> lock(state.mutex, std::try_to_lock);
    if (lock.owns_lock()) {
      try {
        if (state.pool == nullptr) state.pool = new ThreadPool(state.wanted.load());
        state.pool->run(items, static_cast<int>(parts < state.pool->size() ? parts : state.pool->size()), task,
                        context);
        return;
      } catch (const std::exception&) {
        state.wanted.store(1);  // no threads to be had: one is enough to be right
      }
    }
  }
  task(context, 0, items);
}

int threads() { return shared().wanted.load(); }

bool set_threads(int count) {
  if (count < 1 || count > kMaxThreads) return false;
  Shared& state = shared();
  std::lock_guard<std::mutex> lock(state.mutex);
  if (state.pool != nullptr && state.pool->size() == count) return true;
  try {
    ThreadPool* fresh = new ThreadPool(count);
    delete state.pool;
    state.pool = fresh;
    state.wanted.store(count);
  } catch (const std::exception&) {
    return false;
  }
  return true;
}

}  // namespace bdk
