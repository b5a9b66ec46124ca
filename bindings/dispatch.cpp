#include "dispatch.h"

#include <atomic>
#include <cstring>

namespace vstar {
namespace {

#if defined(VSTAR_X86)
bool executes_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

bool executes_avx512() {
  return executes_avx2() && __builtin_cpu_supports("avx512f") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}

bool executes_avx512_bf16() { return executes_avx512() && __builtin_cpu_supports("avx512bf16"); }

// Returns whether products of pairs of bfloat16 are faster than those of floats. On Intel's Emerald
// Rapids a multiply-add takes twice as long in pairs, on AMD's Zen 5 half as long: there logits take
// half of the values' time (benchmarks/breakdown.py --dtype bfloat16).
bool multiplies_pairs_fast() { return executes_avx512_bf16() && __builtin_cpu_is("amd"); }
#endif

struct Executable {
  const Kernels* list[5] = {};  // the last stays null

  Executable() {
    int count = 0;
#if defined(VSTAR_X86)
    __builtin_cpu_init();
    const bool pairs_first = multiplies_pairs_fast();
    if (pairs_first) list[count++] = &kernels_avx512_bf16;
    if (executes_avx512()) list[count++] = &kernels_avx512;
    if (executes_avx512_bf16() && !pairs_first) list[count++] = &kernels_avx512_bf16;
    if (executes_avx2()) list[count++] = &kernels_avx2;
#elif defined(VSTAR_ARM64)
    list[count++] = &kernels_neon;  // part of every 64-bit Arm processor
#endif
    list[count++] = &kernels_portable;
  }
};

std::atomic<const Kernels*> selected{nullptr};

}  // namespace

const Kernels* const* executable_kernels() {
  static const Executable executable;
  return executable.list;
}

const Kernels* find_kernels(const char* name) {
  for (const Kernels* const* k = executable_kernels(); *k; ++k) {
    if (std::strcmp((*k)->name, name) == 0) return *k;
  }
  return nullptr;
}

const Kernels& selected_kernels() {
  const Kernels* kernels = selected.load(std::memory_order_acquire);
  return kernels ? *kernels : *executable_kernels()[0];
}

void select_kernels(const Kernels& kernels) {
  selected.store(&kernels, std::memory_order_release);
}

}  // namespace vstar

// Python calls these through ctypes: the library has no Python in it.
extern "C" {

// Returns the number of the operators' interface, INTERFACE in vstar_kernels/attention/native.py: it
// changes with the operators' arguments, so that no library is called that was built for others.
__attribute__((visibility("default"))) int vstar_kernels_interface() { return 5; }

// Returns the names of the executable instruction sets, best first; nullptr past the last.
__attribute__((visibility("default"))) const char* vstar_kernels_isa(int index) {
  const vstar::Kernels* const* list = vstar::executable_kernels();
  for (int i = 0; list[i]; ++i) {
    if (i == index) return list[i]->name;
  }
  return nullptr;
}

__attribute__((visibility("default"))) const char* vstar_kernels_selected_isa() {
  return vstar::selected_kernels().name;
}

// Returns 0, or 1 and changes nothing if this processor cannot execute it.
__attribute__((visibility("default"))) int vstar_kernels_select_isa(const char* name) {
  const vstar::Kernels* kernels = vstar::find_kernels(name);
  if (!kernels) return 1;
  vstar::select_kernels(*kernels);
  return 0;
}
}
