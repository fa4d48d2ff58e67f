// A token reads every weight once, so each page of them is met once: with pages of 4 KiB a core waits for address
// translation about as long as for memory (on a virtual machine more: a read of 512 MB went from 20 to 30 GB/s with
// pages of 2 MiB).  Weights are smaller than such pages, so they are carved one after the other out of chunks, which
// are given back when their last weight is.
#include "weight_memory.h"

#include <atomic>
#include <cstring>
#include <mutex>
#include <new>

#include "layout.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace bdk {

class WeightChunk {
 public:
  std::uint8_t* memory = nullptr;
  std::size_t size = 0;  // mapped, from `mapping` on
  void* mapping = nullptr;
  std::size_t used = 0;              // by the one thread that carves
  std::atomic<std::size_t> live{1};  // weights in it, and the carver
};

#if defined(__linux__)
namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;
constexpr std::size_t kChunkBytes = std::size_t{64} << 20;  // of address space: untouched pages take no memory

std::size_t round_up(std::size_t value, std::size_t to) { return (value + to - 1) / to * to; }

WeightChunk* map_chunk(std::size_t bytes) {
  WeightChunk* chunk = new (std::nothrow) WeightChunk;
  if (chunk == nullptr) return nullptr;
  chunk->size = round_up(bytes, kHugePage) + kHugePage;  // one more, to begin at a whole one
  chunk->mapping =
      mmap(nullptr, chunk->size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (chunk->mapping == MAP_FAILED) {
    delete chunk;
    return nullptr;
  }
  const std::uintptr_t address = reinterpret_cast<std::uintptr_t>(chunk->mapping);
  chunk->memory = static_cast<std::uint8_t*>(chunk->mapping) + (round_up(address, kHugePage) - address);
  madvise(chunk->memory, chunk->size - kHugePage, MADV_HUGEPAGE);  // a wish: without it all is right, and slower
  return chunk;
}

void drop(WeightChunk* chunk) {
  if (chunk->live.fetch_sub(1) != 1) return;
  munmap(chunk->mapping, chunk->size);
  delete chunk;
}

std::mutex carving;
WeightChunk* current = nullptr;

}  // namespace

void WeightFree::operator()(std::uint8_t*) const { drop(chunk); }

WeightBytes allocate_weight(std::size_t bytes) {
  bytes = round_up(bytes, kAlignment);
  if (bytes > kChunkBytes / 2) {
    WeightChunk* own = map_chunk(bytes);
    return own == nullptr ? WeightBytes() : WeightBytes(own->memory, WeightFree{own});
  }
  std::lock_guard<std::mutex> lock(carving);
  if (current == nullptr || current->used + bytes > kChunkBytes) {
    WeightChunk* fresh = map_chunk(kChunkBytes);
    if (fresh == nullptr) return WeightBytes();
    if (current != nullptr) drop(current);
    current = fresh;
  }
  std::uint8_t* memory = current->memory + current->used;
  current->used += bytes;
  current->live.fetch_add(1);
  return WeightBytes(memory, WeightFree{current});
}
#else
void WeightFree::operator()(std::uint8_t* memory) const { ::operator delete(memory, std::align_val_t{kAlignment}); }

WeightBytes allocate_weight(std::size_t bytes) {
  void* memory = ::operator new(bytes, std::align_val_t{kAlignment}, std::nothrow);
  if (memory != nullptr) std::memset(memory, 0, bytes);
  return WeightBytes(static_cast<std::uint8_t*>(memory));
}
#endif

}  // namespace bdk
