// The stages of a panel's gradient that the forward does not have; backward.h puts them together.
#pragma once

#include "microkernels.h"

namespace vstar::VSTAR_ISA {

// Finds the first key whose logit is the query's maximum, as a float, which holds it exactly.
template <int VECTORS>
VSTAR_STAGE void row_argmax(int64_t keys, const float* logits, const float* row_max,
                            float* argmax) {
  for (int c = 0; c < VECTORS; ++c) {
    const Vec m = load(row_max + c * kLanes);
    Vec found = zero();  // for NaN, which equals nothing
    for (int64_t j = keys - 1; j >= 0; --j) {
      const Vec logit = load(logits + (j * VECTORS + c) * kLanes);
      found = select_equal(logit, m, broadcast(static_cast<float>(j)), found);
    }
    store(argmax + c * kLanes, found);
  }
}

// Adds factor * b to the cells a, where b has one row of cells for each block of keys.
template <int VECTORS>
VSTAR_STAGE void add_block_cells(int64_t keys, int64_t block, float factor, const float* b,
                                 float* a) {
  constexpr int lanes = VECTORS * kLanes;
  for (int64_t begin = 0; begin < keys; begin += block, b += lanes) {
    const int64_t end = min64(begin + block, keys);
    for (int64_t j = begin; j < end; ++j, a += lanes) {
      for (int c = 0; c < lanes; c += kLanes) {
        store(a + c, fma(broadcast(factor), load(b + c), load(a + c)));
      }
    }
  }
}

// Takes weights up to one over their sum, and the gradient to the normalised ones. Normalises the
// weights, and turns the gradient into that to the logits,
//
//     grads[j][i] = weights[j][i] * (grads[j][i] - sum_k weights[k][i] grads[k][i])
template <int VECTORS>
VSTAR_STAGE void softmax_gradient(int64_t keys, const float* inverse_sum, float* weights,
                                  float* grads, float* mean) {
  sum_over_keys<VECTORS>(keys, mean, [&](Vec sum, int64_t j, int c) VSTAR_INLINE {
    const int64_t cell = (j * VECTORS + c) * kLanes;
    return fma(load(weights + cell), load(grads + cell), sum);
  });
  Vec inverse[VECTORS], shift[VECTORS];
  for (int c = 0; c < VECTORS; ++c) {
    inverse[c] = load(inverse_sum + c * kLanes);
    shift[c] = mul(inverse[c], load(mean + c * kLanes));
  }
  for (int64_t j = 0; j < keys; ++j) {
    for (int c = 0; c < VECTORS; ++c) {
      const int64_t cell = (j * VECTORS + c) * kLanes;
      const Vec weight = mul(inverse[c], load(weights + cell));
      store(weights + cell, weight);
      store(grads + cell, mul(weight, sub(load(grads + cell), shift[c])));
    }
  }
}

// Sets sum[i] = sum_j grads[j][i] * delta(j, i), the gradient to strength * stat. Of the lanes,
// `query_count` hold queries, as in add_bias.
template <int VECTORS>
VSTAR_STAGE void dot_delta(const float* delta, int64_t key_stride, int64_t keys, int query_count,
                           const float* grads, float* sum) {
  sum_over_keys<VECTORS>(keys, sum, [&](Vec so_far, int64_t j, int c) VSTAR_INLINE {
    const float* entries = delta + j * key_stride + c * kLanes;
    const int lanes = query_count - c * kLanes;
    const Vec d = lanes >= kLanes ? load(entries) : load_partial(entries, lanes);
    return fma(load(grads + (j * VECTORS + c) * kLanes), d, so_far);
  });
}

// Adds the sums of a sequence's later parts to those of its first, in their order. A part has
// `size` sums, a multiple of the vectors' lanes, and follows the one before it.
inline void add_up_parts(float* sums, int64_t size, int64_t parts) {
  for (int64_t part = 1; part < parts; ++part) {
    for (int64_t i = 0; i < size; i += kLanes) {
      store(sums + i, add(load(sums + i), load(sums + part * size + i)));
    }
  }
}

// Writes `scale` times a row of sums, which is padded to whole vectors, to a tensor's row.
template <typename T>
void write_row(const float* sums, float scale, int64_t head_dim, T* out) {
  const Vec factor = broadcast(scale);
  for (int64_t d = 0; d < head_dim; d += kLanes) {
    const Vec y = mul(load(sums + d), factor);
    const int64_t rest = head_dim - d;
    if (rest >= kLanes) {
      store(out + d, y);
    } else {
      store_partial(out + d, y, static_cast<int>(rest));
    }
  }
}

// Where a product over queries is added to rows of sums.
struct RowSums {
  float* sums;
  int64_t stride, rows;

  RowSums tile_at(int64_t row, int64_t column) const {
    return {sums + row * stride + column, stride, rows - row};
  }
  template <bool PARTIAL, int COLUMNS>
  VSTAR_INLINE void put(Vec (&sum)[kProductRows][COLUMNS], int) const {
    const RowSums here = *this;  // in registers: the stores could be to the original
    unrolled<kProductRows>([&](auto r) VSTAR_INLINE {
      if (r >= here.rows) return;
      unrolled<COLUMNS>([&](auto c) VSTAR_INLINE {
        float* p = here.sums + r * here.stride + c * kLanes;
        store(p, add(load(p), sum[r][c]));
      });
    });
  }
};

}  // namespace vstar::VSTAR_ISA
