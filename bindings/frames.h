// Attention over frames of tokens: what the operator, its schedule and its kernels share.
//
// Like types.h, this header is included by every instruction set's file: plain data, no functions
// with bodies.
#pragma once

#include "types.h"

namespace vstar {

// The statistic that delta is weighted with; the numbers are those of the operators' schemas.
enum class FrameStat : int32_t { none = 0, row_max = 1, frame_max = 2, tensor = 3 };

// The tokens of a sequence sorted by frame: those of frame f are order[begin[f]], ..., up to
// order[begin[f + 1] - 1], in ascending positions. Text is frame number `frames`, the last.
struct FrameOrder {
  int64_t tokens, frames;
  const int32_t* order;
  const int64_t* begin;  // frames + 2
};

// What is asked for. Tensors are (batch, tokens, heads, head_dim), where Strides.frame is that of
// tokens and Strides.space means nothing. Tables are over (query frame f, key frame g), the entry of
// a head being table[head * head_stride + f * keys.frames + g].
struct FrameArgs {
  ScalarType type;
  int64_t batch, heads, key_heads, head_dim;
  FrameOrder queries, keys;
  const void* query;
  const void* key;
  const void* value;
  Strides query_strides, key_strides, value_strides;
  float scale;
  const int32_t* key_lengths;  // (batch); null: all keys exist

  FrameStat stat;
  bool clamp_negative;
  const float* stat_tensor;  // FrameStat::tensor only
  Strides stat_strides;
  const float* delta;  // null: the statistic weighs nothing
  int64_t delta_head_stride;
  const float* offset;  // null: zero
  int64_t offset_head_stride;
  // Of positive logits and of the others, factor_sign_stride apart; null: one.
  const float* factor;
  int64_t factor_head_stride, factor_sign_stride;
  // Of places of a key less places of a query, each in its frame: the lowest, and one table later
  // the highest. Where a factor holds, and which keys are visible; null: all of them.
  const int32_t* factor_span;
  const int32_t* band;

  void* out;
  Strides out_strides;

  // A block is this many of the sorted queries; a block of a batch element and head is an item.
  int64_t queries_per_block;
  // Sums of a block's queries' mass: keys.frames + 1 floats for each frame of its queries, in rows
  // of which block b's first is map_rows[b], and a head has map_rows_per_head. Null: no map.
  float* map_sums;
  const int64_t* map_rows;
  int64_t map_rows_per_head;
};

// What the gradients are asked for; out and the map's sums are not used. Factors have none.
struct FrameBackwardArgs : FrameArgs {
  const void* grad_out;
  Strides grad_out_strides;
  const float* grad_map;  // (batch, [heads,] query frames, key frames + 1); null: zero
  bool map_by_head;
  void* grad_query;
  void* grad_key;
  void* grad_value;
  Strides grad_query_strides, grad_key_strides, grad_value_strides;
  // An item is one of so many parts of the queries of a batch element and key head. Each has sums of
  // dk and dv: two rows of head_dim, padded to whole vectors, for each key.
  int64_t parts;
  float* sums;
};

}  // namespace vstar
