// Loops over vectors that the compiler unrolls, and the arithmetic of sizes.
#pragma once

#include <stdint.h>

#define VSTAR_INLINE __attribute__((always_inline))
// A function of its own for profilers (benchmarks/breakdown.py), long enough that the call is free.
#define VSTAR_STAGE __attribute__((noinline))

namespace vstar::VSTAR_ISA {

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t divide_up(int64_t x, int64_t divisor) { return (x + divisor - 1) / divisor; }
inline int64_t round_up(int64_t x, int64_t multiple) { return divide_up(x, multiple) * multiple; }

// A number that is a constant for the compiler, also where a lambda takes it as an argument.
template <int I>
struct Constant {
  constexpr operator int() const { return I; }
};

// Calls body(Constant<0>{}), ..., body(Constant<COUNT - 1>{}). The indices are constants before the
// optimizer looks; without that GCC leaves arrays of accumulators in memory.
template <int COUNT, typename Body>
[[gnu::always_inline]] inline void unrolled(const Body& body) {
  if constexpr (COUNT > 0) {
    unrolled<COUNT - 1>(body);
    body(Constant<COUNT - 1>{});
  }
}
// Calls body(row, column) for each cell of a ROWS x COLUMNS tile.
template <int ROWS, int COLUMNS, typename Body>
[[gnu::always_inline]] inline void unrolled(const Body& body) {
  unrolled<ROWS * COLUMNS>([&](auto i) VSTAR_INLINE {
    body(Constant<i / COLUMNS>{}, Constant<i % COLUMNS>{});
  });
}

// Calls body with a panel's number of vectors of queries, 1 or 2, as a constant.
template <typename Body>
[[gnu::always_inline]] inline void with_vectors(int vectors, const Body& body) {
  if (vectors == 1) {
    body(Constant<1>{});
  } else {
    body(Constant<2>{});
  }
}

}  // namespace vstar::VSTAR_ISA
