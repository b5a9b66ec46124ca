// The pieces of a panel's gradient that the forward does not have (backward.h puts them together).
#pragma once

#include "microkernels.h"

namespace vstar::VSTAR_ISA {

// As pack_rows, of rows that are not contiguous.
template <typename T>
VSTAR_STAGE void gather_rows(const T* rows, int64_t stride, int64_t dim_stride, int64_t count,
                             int64_t head_dim, float* packed) {
  for (int64_t r = 0; r < count; ++r, packed += head_dim) {
    const T* row = rows + r * stride;
    // All of a row is one number in the gradient of a sum.
    const int64_t read = dim_stride == 0 ? 1 : head_dim;
    for (int64_t d = 0; d < read; ++d) {
      store_partial(packed + d, load_partial(row + d * dim_stride, 1), 1);
    }
    for (int64_t d = read; d < head_dim; ++d) packed[d] = packed[0];
  }
}

// The first key whose logit is the row's maximum, as a float, which holds it exactly.
template <int VECTORS>
VSTAR_STAGE void first_maxima(int64_t keys, const float* logits, const float* row_max,
                              float* first) {
  for (int c = 0; c < VECTORS; ++c) {
    const Vec m = load(row_max + c * kLanes);
    Vec found = zero();  // for NaN, which equals nothing
    for (int64_t j = keys - 1; j >= 0; --j) {
      const Vec logit = load(logits + (j * VECTORS + c) * kLanes);
      found = select_equal(logit, m, broadcast(static_cast<float>(j)), found);
    }
    store(first + c * kLanes, found);
  }
}

// a += factor * b
template <int VECTORS>
VSTAR_STAGE void add_cells(int64_t keys, float factor, const float* b, float* a) {
  for (int64_t i = 0; i < keys * VECTORS * kLanes; i += kLanes) {
    store(a + i, fma(broadcast(factor), load(b + i), load(a + i)));
  }
}

// sum[i] = sum over keys of term(cell, key, vector), in blocks of keys.
template <int VECTORS, typename Term>
[[gnu::always_inline]] inline void sum_over_keys(int64_t keys, float* sum, const Term& term) {
  Vec total[VECTORS];
  for (int c = 0; c < VECTORS; ++c) total[c] = zero();
  for (int64_t start = 0; start < keys; start += kKeyBlock) {
    const int64_t end = min64(start + kKeyBlock, keys);
    Vec part[VECTORS];
    for (int c = 0; c < VECTORS; ++c) part[c] = zero();
    for (int64_t j = start; j < end; ++j) {
      for (int c = 0; c < VECTORS; ++c) part[c] = term(part[c], j, c);
    }
    for (int c = 0; c < VECTORS; ++c) total[c] = add(total[c], part[c]);
  }
  for (int c = 0; c < VECTORS; ++c) store(sum + c * kLanes, total[c]);
}

// From weights up to one over their sum and the gradient to the normalised ones: normalises the
// weights and turns the gradient into the logits',
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

// sum[i] = sum_j grads[j][i] * bias(j, i), the gradient to strength * stat; `count` as in add_bias.
template <int VECTORS>
VSTAR_STAGE void sum_bias(const float* bias, int64_t key_stride, int64_t keys, int count,
                          const float* grads, float* sum) {
  sum_over_keys<VECTORS>(keys, sum, [&](Vec part, int64_t j, int c) VSTAR_INLINE {
    const float* row = bias + j * key_stride + c * kLanes;
    const int lanes = count - c * kLanes;
    const Vec delta = lanes >= kLanes ? load(row) : load_partial(row, lanes);
    return fma(load(grads + (j * VECTORS + c) * kLanes), delta, part);
  });
}

}  // namespace vstar::VSTAR_ISA
