// Attention to a few keys and the maps of chosen columns of its weights: what the operator, its
// schedule and its kernels share.
//
// Like types.h, this header is included by every instruction set's file: plain data, no functions
// with bodies.
#pragma once

#include "types.h"

namespace vstar {

// A key that a column weighs, and by how much.
struct ColumnEntry {
  int64_t key;
  float weight;
};

// The columns as lists of what is not zero: of batch element b and column k the entries [begin[i],
// begin[i + 1]), i = b * batch_stride + k.
struct ColumnEntries {
  const ColumnEntry* entries;
  const int64_t* begin;
  int64_t batch_stride;  // 0 where all of the batch shares the columns
};

// What is asked for. Tensors are (batch, tokens, heads, head_dim), where Strides.frame is that of
// tokens and Strides.space means nothing.
struct ColumnArgs {
  ScalarType type;
  int64_t batch, queries, keys, heads, head_dim, columns;
  const void* query;
  const void* key;
  const void* value;  // null: no output, nor its gradient
  Strides query_strides, key_strides, value_strides;
  float scale;
  const float* column_weights;    // G, rows of `columns` for each key
  int64_t column_weights_stride;  // of the batch; 0 where all of it shares G

  void* out;  // null where there is no value
  Strides out_strides;
  float* maps;  // (batch, queries, columns); null: not wanted

  // An item of the forward is so many queries of a batch element, of all heads.
  int64_t queries_per_block;
  // Where columns are as sparse as those that choose keys are; begin is null where they are not.
  ColumnEntries sparse;
};

// What the gradients are asked for; out and maps are not used.
struct ColumnBackwardArgs : ColumnArgs {
  const void* grad_out;  // null: zero
  Strides grad_out_strides;
  const float* grad_maps;  // (batch, queries, columns); null: zero
  // Null: not wanted.
  void* grad_query;
  void* grad_key;
  void* grad_value;
  Strides grad_query_strides, grad_key_strides, grad_value_strides;
  // An item is one of so many parts of the queries of a batch element and head. Where grad_key or
  // grad_value is wanted, each has sums of both: two rows of head_dim, padded to whole vectors, for
  // each key.
  int64_t parts;
  float* sums;
};

}  // namespace vstar
