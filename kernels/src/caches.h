// What a kernel has to know about this machine's caches.
#pragma once

#include <cstdint>

namespace bdk {

// Whether the first cache of data of an x86 has 48 KiB or more (Zen 5, Ice Lake and later), and so holds what is asked
// for kLargeCacheAheadBytes ahead beside what is worked on; one of 32 KiB does not.  False where the system does not
// say, and on ARM, where it was not measured.
bool has_large_first_cache();

constexpr std::int32_t kLargeCacheAheadBytes = 8192;

}  // namespace bdk
