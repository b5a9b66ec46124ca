// The kernels for one instruction set. Nothing but intrinsics and code of that set's own namespace
// may be included here: a std or torch template instantiated in this file could be the copy that
// the linker keeps for every processor.
#define VSTAR_ISA avx2
#include "simd_avx2.h"
#include "backward.h"
#include "columns_backward.h"
#include "columns_forward.h"
#include "forward.h"
#include "frames_backward.h"
#include "frames_forward.h"

namespace vstar {
const Kernels kernels_avx2 = {"avx2",
                              avx2::kLanes,
                              avx2::forward_scratch,
                              avx2::forward,
                              avx2::forward_map,
                              avx2::backward_scratch,
                              avx2::backward_sums,
                              avx2::backward,
                              avx2::backward_finish,
                              avx2::frames_scratch,
                              avx2::frames_forward,
                              avx2::frames_backward_scratch,
                              avx2::frames_backward,
                              avx2::frames_backward_finish,
                              avx2::columns_scratch,
                              avx2::columns_forward,
                              avx2::columns_backward_scratch,
                              avx2::columns_backward,
                              avx2::columns_backward_finish,
                              avx2::exp2};
}  // namespace vstar
