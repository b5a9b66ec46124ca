// Which instruction set's kernels run.
#pragma once

#include "types.h"

namespace vstar {

// The kernels that this processor can execute, best first; ends with nullptr.
const Kernels* const* executable_kernels();

// By name among the executable ones; nullptr if there is none.
const Kernels* find_kernels(const char* name);

// The best executable ones unless select_kernels() chose others.
const Kernels& selected_kernels();
void select_kernels(const Kernels& kernels);

}  // namespace vstar
