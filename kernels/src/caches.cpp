#include "caches.h"

#include <unistd.h>

namespace bdk {

bool has_large_first_cache() {
#if defined(BDK_X86) && defined(_SC_LEVEL1_DCACHE_SIZE)
  static const bool large = sysconf(_SC_LEVEL1_DCACHE_SIZE) >= 48 * 1024;
  return large;
#else
  return false;
#endif
}

}  // namespace bdk
