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

// What is asked of either direction. Tensors are (batch, space, frames, heads, head_dim); a
// sequence is one (batch, space, head), numbered in that order.
struct Problem {
  ScalarType type;
  int64_t batch, space, frames, heads, head_dim;
  const void* query;
  const void* key;
  const void* value;
  Strides query_strides, key_strides, value_strides;
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
};

struct ForwardArgs : Problem {
  void* out;
  Strides out_strides;
  // A sequence's query rows are shared out in items of this many rows; any value gives the same
  // bits.
  int64_t rows_per_item;
  bool wants_map;  // the scratch has room for the map's sums
};

// A part of the mean map: the given rows of it, over a run of sequences of one batch element.
struct MapPart {
  int64_t first_sequence, last_sequence;
  int64_t first_row, last_row;  // at most rows_per_item
  float* map;                   // (frames, frames), of that batch element
  bool add;                     // to what is there
};

// Sums for the bias's gradient, over runs of sequences. They are kept so that vectors of queries
// are added to whole aligned vectors, at (head, key j, query i)
//
//     head * head_stride + (j - j % lanes) * block_stride + (j % lanes) * key_stride + i
//
// of `data`. A matrix has both strides alike. A table has one copy for each remainder of j, in
// which the blocks' vectors coincide or are disjoint, and block_stride = -1: a load never waits for
// two stores that it overlaps.
struct BiasSums {
  float* data;  // null: not wanted
  int64_t head_stride, block_stride, key_stride;
};

struct BackwardArgs : Problem {
  bool detach_stat;
  const void* grad_out;
  Strides grad_out_strides;
  int64_t grad_out_dim_stride;  // the only tensor that need not be contiguous in head_dim
  const float* grad_map;        // (batch, frames, frames); null: zero
  void* grad_query;
  void* grad_key;
  void* grad_value;
  Strides grad_query_strides, grad_key_strides, grad_value_strides;
  float* grad_stat;  // null: not wanted
  Strides grad_stat_strides;
  BiasSums bias_sums;
};

// One instruction set's kernels.
struct Kernels {
  const char* name;
  int lanes;  // float lanes of a vector
  // Floats of scratch that one thread needs for forward(); their contents do not matter.
  int64_t (*forward_scratch)(const ForwardArgs&);
  // Computes items [first, last); item = sequence * items_per_sequence + chunk of rows.
  void (*forward)(const ForwardArgs&, int64_t first, int64_t last, float* scratch);
  // As forward(), for the sequences and rows of one part of the map, and that part.
  void (*forward_map)(const ForwardArgs&, const MapPart&, float* scratch);
  int64_t (*backward_scratch)(const BackwardArgs&);
  // The gradients of sequences [first, last).
  void (*backward)(const BackwardArgs&, int64_t first, int64_t last, float* scratch);
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
