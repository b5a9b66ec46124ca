// The kernels for one instruction set. Nothing but intrinsics and code of that set's own namespace
// may be included here: a std or torch template instantiated in this file could be the copy that
// the linker keeps for every processor.
#define VSTAR_ISA neon
#include "simd_neon.h"
#include "backward.h"
#include "columns_backward.h"
#include "columns_forward.h"
#include "forward.h"
#include "frames_backward.h"
#include "frames_forward.h"

namespace vstar {
const Kernels kernels_neon = {"neon",
                              neon::kLanes,
                              neon::forward_scratch,
                              neon::forward,
                              neon::forward_map,
                              neon::backward_scratch,
                              neon::backward_sums,
                              neon::backward,
                              neon::backward_finish,
                              neon::frames_scratch,
                              neon::frames_forward,
                              neon::frames_backward_scratch,
                              neon::frames_backward,
                              neon::frames_backward_finish,
                              neon::columns_scratch,
                              neon::columns_forward,
                              neon::columns_backward_scratch,
                              neon::columns_backward,
                              neon::columns_backward_finish,
                              neon::exp2};
}  // namespace vstar
