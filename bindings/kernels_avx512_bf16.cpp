// The kernels for one instruction set. Nothing but intrinsics and code of that set's own namespace
// may be included here: a std or torch template instantiated in this file could be the copy that
// the linker keeps for every processor.
#define VSTAR_ISA avx512_bf16
#define VSTAR_BFLOAT16_PAIRS
#include "simd_avx512.h"
#include "backward.h"
#include "columns_backward.h"
#include "columns_forward.h"
#include "forward.h"
#include "frames_backward.h"
#include "frames_forward.h"

namespace vstar {
const Kernels kernels_avx512_bf16 = {"avx512_bf16",
                                     avx512_bf16::kLanes,
                                     avx512_bf16::forward_scratch,
                                     avx512_bf16::forward,
                                     avx512_bf16::forward_map,
                                     avx512_bf16::backward_scratch,
                                     avx512_bf16::backward_sums,
                                     avx512_bf16::backward,
                                     avx512_bf16::backward_finish,
                                     avx512_bf16::frames_scratch,
                                     avx512_bf16::frames_forward,
                                     avx512_bf16::frames_backward_scratch,
                                     avx512_bf16::frames_backward,
                                     avx512_bf16::frames_backward_finish,
                                     avx512_bf16::columns_scratch,
                                     avx512_bf16::columns_forward,
                                     avx512_bf16::columns_backward_scratch,
                                     avx512_bf16::columns_backward,
                                     avx512_bf16::columns_backward_finish,
                                     avx512_bf16::exp2};
}  // namespace vstar
