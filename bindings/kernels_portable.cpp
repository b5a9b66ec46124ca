// The kernels for one instruction set. Nothing but intrinsics and code of that set's own namespace
// may be included here: a std or torch template instantiated in this file could be the copy that
// the linker keeps for every processor.
#define VSTAR_ISA portable
#include "simd_portable.h"
#include "backward.h"
#include "columns_backward.h"
#include "columns_forward.h"
#include "forward.h"
#include "frames_backward.h"
#include "frames_forward.h"

namespace vstar {
const Kernels kernels_portable = {"portable",
                                  portable::kLanes,
                                  portable::forward_scratch,
                                  portable::forward,
                                  portable::forward_map,
                                  portable::backward_scratch,
                                  portable::backward_sums,
                                  portable::backward,
                                  portable::backward_finish,
                                  portable::frames_scratch,
                                  portable::frames_forward,
                                  portable::frames_backward_scratch,
                                  portable::frames_backward,
                                  portable::frames_backward_finish,
                                  portable::columns_scratch,
                                  portable::columns_forward,
                                  portable::columns_backward_scratch,
                                  portable::columns_backward,
                                  portable::columns_backward_finish,
                                  portable::exp2};
}  // namespace vstar
