// What the torch-facing code and the kernels share: plain data, no functions with bodies.
//
// This header is the only one that every translation unit includes. It must stay free of inline
// functions and std templates: the linker keeps one copy of each, and it could be the AVX-512 one.
#pragma once

#include <stdint.h>

namespace vstar {

enum class ScalarType : int32_t { float32 = 0, bfloat16 = 1, float16 = 2 };

// The row statistic that weights the bias; the numbers are those of the operator's schema.
enum class Stat : int32_t { none = 0, row_max = 1, map_max = 2, tensor = 3 };

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// Strides in elements; head_dim is contiguous.
struct Strides {
  int64_t batch, space, frame, head;
};

// One forward call. Tensors are (batch, space, frames, heads, head_dim); a sequence is one
// (batch, space, head), numbered in that order.
struct ForwardArgs {
  ScalarType type;
  int64_t batch, space, frames, heads, head_dim;
  const void* query;
  const void* key;
  const void* value;
  void* out;
  Strides query_strides, key_strides, value_strides, out_strides;
  float scale;

  // The bias of (head, key j, query i) is bias[head * bias_head_stride + j * bias_key_stride + i].
  // A Toeplitz table centred on `bias` has bias_key_stride = -1, a transposed matrix has N.
  // Null: no regularization.
  const float* bias;
  int64_t bias_head_stride, bias_key_stride;
  float strength;
  Stat stat;
  bool clamp_negative;
  const float* stat_values;  // Stat::tensor only
  Strides stat_strides;

  // A sequence's query rows are shared out in items of this many rows; any value gives the same
  // bits.
  int64_t rows_per_item;
};

// One instruction set's kernels.
struct Kernels {
  const char* name;
  int lanes;  // float lanes of a vector
  // Floats of scratch that one thread needs for forward(); their contents do not matter.
  int64_t (*forward_scratch)(const ForwardArgs&);
  // Computes items [first, last); item = sequence * items_per_sequence + chunk of rows.
  void (*forward)(const ForwardArgs&, int64_t first, int64_t last, float* scratch);
  // out[i] = 2^in[i], as the softmax computes it; for tests.
  void (*exp2)(const float* in, float* out, int64_t count);
};

extern const Kernels kernels_portable;
#if defined(VSTAR_X86)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512_bf16;
#elif defined(VSTAR_ARM64)
extern const Kernels kernels_neon;
#endif

}  // namespace vstar
