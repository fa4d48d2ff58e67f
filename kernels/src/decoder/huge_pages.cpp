#include "huge_pages.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace bdk {

#if defined(__linux__)
namespace {

constexpr std::uintptr_t kHugePage = std::uintptr_t{2} << 20;
#if defined(MADV_COLLAPSE)
constexpr int kCollapse = MADV_COLLAPSE;
#else
constexpr int kCollapse = 25;  // Linux 6.1; older ones refuse it
#endif

}  // namespace

void gather_pages(const void* memory, std::int64_t bytes) {
  const std::uintptr_t address = reinterpret_cast<std::uintptr_t>(memory);
  const std::uintptr_t first = (address + kHugePage - 1) / kHugePage * kHugePage;
  const std::uintptr_t end = (address + static_cast<std::uintptr_t>(bytes)) / kHugePage * kHugePage;
  if (first >= end) return;
  madvise(reinterpret_cast<void*>(first), end - first, kCollapse);
}
#else
void gather_pages(const void*, std::int64_t) {}
#endif

}  // namespace bdk
