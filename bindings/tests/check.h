// Just enough of a test framework: CHECK counts, finish() reports.
#pragma once

#include <cstdio>
#include <cstdlib>

#include "dispatch.h"

inline int checks = 0, failures = 0;

#define CHECK(condition, ...)                               \
  do {                                                      \
    ++checks;                                               \
    if (!(condition) && ++failures <= 20) {                 \
      std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                             \
      std::printf("\n");                                    \
    }                                                       \
  } while (0)

// Runs a test for each instruction set that this processor can execute.
template <typename Test>
void for_each_isa(const Test& test) {
  for (const vstar::Kernels* const* k = vstar::executable_kernels(); *k; ++k) test(**k);
}

inline int finish() {
  for_each_isa([](const vstar::Kernels& kernels) { std::printf("%s, ", kernels.name); });
  std::printf("%d checks, %d failed\n", checks, failures);
  return failures == 0 && checks > 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
