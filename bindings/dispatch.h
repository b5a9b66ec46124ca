// Chooses the instruction set whose kernels run.
#pragma once

#include "types.h"

namespace vstar {

// Returns the kernels that this processor can execute, best first; the list ends with nullptr.
const Kernels* const* executable_kernels();

// Returns the executable kernels of this name; nullptr if there are none.
const Kernels* find_kernels(const char* name);

// Returns the kernels in use: the best executable ones unless select_kernels() chose others.
const Kernels& selected_kernels();
void select_kernels(const Kernels& kernels);

}  // namespace vstar
