// What the torch-facing code and the kernels share: plain data, no functions with bodies.
//
// This header is the only one that every translation unit includes. It must stay free of inline
// functions and std templates: the linker keeps one copy of each, and it could be the AVX-512 one.
#pragma once

#include <stdint.h>

namespace vstar {

enum class ScalarType : int32_t { float32 = 0, bfloat16 = 1, float16 = 2 };

// The row statistic that Δ is weighted with; the numbers are those of the operators' schemas.
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

// What both directions are asked. Tensors are (batch, space, frames, heads, head_dim); a sequence
// is one (batch, space, head), numbered in that order.
struct Problem {
  ScalarType type;
  int64_t batch, space, frames, heads, head_dim;
  const void* query;
  const void* key;
  const void* value;
  Strides query_strides, key_strides, value_strides;
  float scale;

  // Δ of (head, key j, query i) is delta[head * delta_head_stride + j * delta_key_stride + i], with
  // the queries next to each other, as the lanes take them (delta.h). A Toeplitz table centred on
  // `delta` has delta_key_stride = -1, a transposed matrix has N. Null: no regularization.
  const float* delta;
  int64_t delta_head_stride, delta_key_stride;
  float strength;
  Stat stat;
  bool clamp_negative;
  const float* stat_tensor;  // Stat::tensor only
  Strides stat_strides;

  // The mean map is summed over blocks of so many frames (at most all of them), of which there are
  // map_blocks. A batch element has map_heads maps: one, the mean of all heads, or one for each head.
  // All are 0 where there is no map, and backward, where it has no gradient.
  int64_t map_block, map_blocks, map_heads;

  // Whether results are too many to be in the caches when they are read, so that they may be stored
  // past them. It changes no bit.
  bool past_caches;
};

struct ForwardArgs : Problem {
  void* out;
  Strides out_strides;
  // A sequence's queries are shared out in items of this many; any value gives the same bits.
  int64_t queries_per_item;
};

// A slice of a mean map's computation: the rows of some queries, at most queries_per_item, over
// some of the sequences that the map is the mean of.
struct MapSlice {
  int64_t sequence_begin, sequence_end;  // every map_heads-th of these
  int64_t query_begin, query_end;  // whole blocks of them, or a part of one block
  float* map;                      // the rows of these blocks, of map_blocks floats
  bool accumulate;                 // whether to add to what is there
};

// Sums for Δ's gradient, over runs of sequences. They are kept so that vectors of queries are added
// to whole aligned vectors, at (head, key j, query i)
//
//     head * head_stride + (j - j % lanes) * block_stride + (j % lanes) * key_stride + i
//
// of `data`. A matrix has both strides alike. A table has one copy for each remainder of j, in
// which the blocks' vectors coincide or are disjoint, and block_stride = -1: a load never waits for
// two stores that it overlaps.
struct DeltaSums {
  float* data;  // null: not wanted
  int64_t head_stride, block_stride, key_stride;
};

struct BackwardArgs : Problem {
  bool detach_stat;
  const void* grad_out;
  Strides grad_out_strides;
  int64_t grad_out_dim_stride;  // the only tensor that need not be contiguous in head_dim
  const float* grad_map;        // (batch, map_heads, map_blocks, map_blocks); null: zero
  void* grad_query;
  void* grad_key;
  void* grad_value;
  Strides grad_query_strides, grad_key_strides, grad_value_strides;
  float* grad_stat;  // null: not wanted
  Strides grad_stat_strides;
  DeltaSums delta_sums;
  // An item is one of so many parts of a sequence's queries. More than one have sums of their own
  // of the gradients of key and value, backward_sums() floats each; null where there is one.
  int64_t parts;
  float* part_sums;
};

struct FrameArgs;  // frames.h
struct FrameBackwardArgs;
struct ColumnArgs;  // columns.h
struct ColumnBackwardArgs;

// One instruction set's kernels.
struct Kernels {
  const char* name;
  int lanes;  // float lanes of a vector
  // Returns how many floats of scratch one thread needs for forward(); what they hold does not
  // matter.
  int64_t (*forward_scratch)(const ForwardArgs&);
  // Computes items [begin, end); item = sequence * items_per_sequence + which of its queries.
  void (*forward)(const ForwardArgs&, int64_t begin, int64_t end, float* scratch);
  // Does as forward() for the sequences and queries of a slice of the map, and computes that slice.
  void (*forward_map)(const ForwardArgs&, const MapSlice&, float* scratch);
  int64_t (*backward_scratch)(const BackwardArgs&);
  // Returns how many floats the sums of one item take, where there are several of a sequence.
  int64_t (*backward_sums)(const BackwardArgs&);
  // Computes items [begin, end); item = sequence * parts + part.
  void (*backward)(const BackwardArgs&, int64_t begin, int64_t end, float* scratch);
  // Writes the gradients of key and value of a sequence that was computed in parts.
  void (*backward_finish)(const BackwardArgs&, int64_t sequence);
  int64_t (*frames_scratch)(const FrameArgs&);
  // Computes one item; item = (batch * heads + head) * blocks + block.
  void (*frames_forward)(const FrameArgs&, int64_t item, float* scratch);
  int64_t (*frames_backward_scratch)(const FrameBackwardArgs&);
  // Computes one item; item = (batch * key_heads + key head) * parts + part.
  void (*frames_backward)(const FrameBackwardArgs&, int64_t item, float* scratch);
  // Writes the gradients of keys and values of a sequence, batch * key_heads + key head.
  void (*frames_backward_finish)(const FrameBackwardArgs&, int64_t sequence);
  int64_t (*columns_scratch)(const ColumnArgs&);
  // Computes one item; item = batch * blocks + block.
  void (*columns_forward)(const ColumnArgs&, int64_t item, float* scratch);
  int64_t (*columns_backward_scratch)(const ColumnBackwardArgs&);
  // Computes one item; item = (batch * heads + head) * parts + part.
  void (*columns_backward)(const ColumnBackwardArgs&, int64_t item, float* scratch);
  // Writes the gradients of keys and values of a sequence, batch * heads + head.
  void (*columns_backward_finish)(const ColumnBackwardArgs&, int64_t sequence);
  // Sets out[i] = 2^in[i], as the softmax computes it; for tests.
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
