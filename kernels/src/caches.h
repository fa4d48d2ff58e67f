// What a kernel has to know about this machine's caches.
#pragma once

namespace bdk {

// Whether the first cache of data has 48 KiB or more (Zen 5, Ice Lake and later), and so holds what is asked for 8 KiB
// ahead beside what is worked on; one of 32 KiB does not.  False where the system does not say.
bool has_large_first_cache();

}  // namespace bdk
