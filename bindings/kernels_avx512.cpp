// The kernels for one instruction set. Nothing but intrinsics and code of that set's own namespace
// may be included here: a std or torch template instantiated in this file could be the copy that
// the linker keeps for every processor.
#define VSTAR_ISA avx512
#include "simd_avx512.h"
#include "backward.h"
#include "columns_backward.h"
#include "columns_forward.h"
#include "forward.h"
#include "frames_backward.h"
#include "frames_forward.h"

namespace vstar {
const Kernels kernels_avx512 = {"avx512",
                                avx512::kLanes,
                                avx512::forward_scratch,
                                avx512::forward,
                                avx512::forward_map,
                                avx512::backward_scratch,
                                avx512::backward_sums,
                                avx512::backward,
                                avx512::backward_finish,
                                avx512::frames_scratch,
                                avx512::frames_forward,
                                avx512::frames_backward_scratch,
                                avx512::frames_backward,
                                avx512::frames_backward_finish,
                                avx512::columns_scratch,
                                avx512::columns_forward,
                                avx512::columns_backward_scratch,
                                avx512::columns_backward,
                                avx512::columns_backward_finish,
                                avx512::exp2};
}  // namespace vstar
