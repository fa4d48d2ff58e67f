// Pages of 2 MiB under memory that others own.
#pragma once

#include <cstdint>

namespace bdk {

// Asks the system to put the whole pages of 2 MiB within a range in one piece; the bytes stay what they are.  A wish:
// where it is not granted all is right, and slower.  (A head of 131 MB is read once a token, each small page once.)
void gather_pages(const void* memory, std::int64_t bytes);

}  // namespace bdk
