// How rows are fetched and stored where a vector is a part of a cache line.
#pragma once

namespace vstar::VSTAR_ISA {

// Rows that are needed next are fetched into the first cache.
constexpr int kFetchLocality = 3;

// The other parts of a vector's line follow too late for one store of all past the caches.
constexpr bool kStoresPastCaches = false;
inline void finish_stores() {}

}  // namespace vstar::VSTAR_ISA
