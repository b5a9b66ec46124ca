// Temporal attention regularization and its gradients as plain loops, in any precision: of one
// sequence, and of a whole call.
#pragma once

#include <cmath>
#include <vector>

#include "delta.h"
#include "types.h"

template <typename Real>
using Numbers = std::vector<Real>;

// The formula of one sequence. Matrices are row by row; row i of an N x N one is query i.
template <typename Real>
struct Formula {
  int64_t N, D;
  Numbers<Real> query, key, value;
  Real scale, strength;
  Numbers<Real> delta;  // (N, N); empty: no regularization
  vstar::Stat stat;
  bool clamp_negative, detach_stat;
  Numbers<Real> stat_tensor;

  // Results.
  Numbers<Real> weights, out;
  Numbers<Real> grad_query, grad_key, grad_value, grad_delta, grad_stat;

  void forward() {
    phi_ = product(query, key);
    for (auto& x : phi_) x *= scale;
    weights.resize(phi_.size());
    largest_.assign(N, 0);
    stat_.assign(N, 1);
    int64_t of_map = 0;
    for (int64_t cell = 0; cell < N * N; ++cell) {
      const int64_t i = cell / N;
      if (phi_[cell] > phi_[of_map]) of_map = cell;
      if (phi_[cell] > phi_[i * N + largest_[i]]) largest_[i] = cell % N;
    }
    of_map_ = of_map;
    for (int64_t i = 0; i < N; ++i) {
      if (stat == vstar::Stat::row_max) stat_[i] = phi_[i * N + largest_[i]];
      if (stat == vstar::Stat::map_max) stat_[i] = phi_[of_map];
      if (stat == vstar::Stat::tensor) stat_[i] = stat_tensor[i];
      softmax(i);
    }
    out = rows(weights, value, false);
  }

  // Computes the gradients; `grad_weights` (N, N) is what comes through the mean map.
  void backward(const Numbers<Real>& grad_out, const Numbers<Real>& grad_weights) {
    Numbers<Real> grads = product(grad_out, value);
    for (int64_t i = 0; i < N; ++i) {
      Real mean = 0;
      for (int64_t j = 0; j < N; ++j) {
        grads[i * N + j] += grad_weights[i * N + j];
        mean += weights[i * N + j] * grads[i * N + j];
      }
      for (int64_t j = 0; j < N; ++j) {
        grads[i * N + j] = weights[i * N + j] * (grads[i * N + j] - mean);
      }
    }
    grad_value = rows(weights, grad_out, true);
    grad_delta.assign(N * N, 0);
    grad_stat.assign(N, 0);
    if (!delta.empty()) through_delta(grads);
    for (auto& x : grads) x *= scale;
    grad_query = rows(grads, key, false);
    grad_key = rows(grads, query, true);
  }

 private:
  Real clamped(int64_t i) const { return clamp_negative && stat_[i] < 0 ? Real(0) : stat_[i]; }

  void softmax(int64_t i) {
    const Real* phi = phi_.data() + i * N;
    Real* row = weights.data() + i * N;
    Real top = -INFINITY, sum = 0;
    for (int64_t j = 0; j < N; ++j) {
      row[j] = phi[j];
      if (!delta.empty()) row[j] += strength * clamped(i) * delta[i * N + j];
      top = row[j] > top ? row[j] : top;
    }
    for (int64_t j = 0; j < N; ++j) sum += row[j] = std::exp(row[j] - top);
    for (int64_t j = 0; j < N; ++j) row[j] /= sum;
  }

  void through_delta(Numbers<Real>& grads) {
    Numbers<Real> to_stat(N, 0);
    for (int64_t i = 0; i < N; ++i) {
      for (int64_t j = 0; j < N; ++j) {
        grad_delta[i * N + j] = strength * clamped(i) * grads[i * N + j];
        to_stat[i] += strength * grads[i * N + j] * delta[i * N + j];
      }
      if (clamp_negative && stat_[i] < 0) to_stat[i] = 0;
    }
    if (detach_stat) return;
    grad_stat = to_stat;
    for (int64_t i = 0; i < N; ++i) {
      if (stat == vstar::Stat::row_max) grads[i * N + largest_[i]] += to_stat[i];
      if (stat == vstar::Stat::map_max) grads[of_map_] += to_stat[i];
    }
  }

  // Returns a b', (N, N).
  Numbers<Real> product(const Numbers<Real>& a, const Numbers<Real>& b) const {
    Numbers<Real> result(N * N, 0);
    for (int64_t i = 0; i < N; ++i)
      for (int64_t j = 0; j < N; ++j)
        for (int64_t d = 0; d < D; ++d) result[i * N + j] += a[i * D + d] * b[j * D + d];
    return result;
  }
  // Returns m x or m' x, (N, D).
  Numbers<Real> rows(const Numbers<Real>& m, const Numbers<Real>& x, bool transposed) const {
    Numbers<Real> result(N * D, 0);
    for (int64_t i = 0; i < N; ++i)
      for (int64_t j = 0; j < N; ++j)
        for (int64_t d = 0; d < D; ++d) {
          result[i * D + d] += m[transposed ? j * N + i : i * N + j] * x[j * D + d];
        }
    return result;
  }

  Numbers<Real> phi_, stat_;
  std::vector<int64_t> largest_;  // the first key of each row's maximum
  int64_t of_map_;
};

// The results of a whole call, laid out as the kernels lay them out; NaN between the rows.
template <typename Real>
struct Results {
  Numbers<Real> out, grad_query, grad_key, grad_value, grad_delta, grad_stat, map;
};

// Computes the formula for all sequences of a call in float32, whose tensors have one layout.
class WholeCall {
 public:
  WholeCall(const vstar::Problem& p, const vstar::UserDelta& delta) : p_(p), delta_(delta) {}

  // Computes the results; without a backward, only the output and the map.
  template <typename Real>
  Results<Real> formula(const vstar::BackwardArgs* backward) const {
    Results<Real> results;
    const auto count = static_cast<size_t>(p_.batch * p_.query_strides.batch);
    for (auto* x :
         {&results.out, &results.grad_query, &results.grad_key, &results.grad_value}) {
      x->assign(count, NAN);
    }
    const int64_t rows = delta_.is_table() ? 1 : delta_.length;
    results.grad_delta.assign(delta_.heads * rows * delta_.length, 0);
    results.grad_stat.assign(p_.batch * p_.space * p_.frames * p_.heads, 0);
    results.map.assign(p_.batch * p_.map_heads * p_.map_blocks * p_.map_blocks, 0);
    for (int64_t b = 0; b < p_.batch; ++b)
      for (int64_t s = 0; s < p_.space; ++s)
        for (int64_t h = 0; h < p_.heads; ++h) add<Real>(b, s, h, backward, results);
    return results;
  }

 private:
  template <typename Real>
  void add(int64_t b, int64_t s, int64_t h, const vstar::BackwardArgs* backward,
           Results<Real>& results) const {
    const int64_t N = p_.frames, D = p_.head_dim;
    Formula<Real> f;
    f.N = N;
    f.D = D;
    f.query = read<Real>(p_.query, p_.query_strides, 1, b, s, h);
    f.key = read<Real>(p_.key, p_.key_strides, 1, b, s, h);
    f.value = read<Real>(p_.value, p_.value_strides, 1, b, s, h);
    f.scale = p_.scale;
    f.strength = p_.strength;
    f.stat = p_.stat;
    f.clamp_negative = p_.clamp_negative;
    f.detach_stat = backward && backward->detach_stat;
    for (int64_t cell = 0; p_.delta && cell < N * N; ++cell) {
      f.delta.push_back(delta_.data[delta_at(h, cell / N, cell % N)]);
    }
    for (int64_t i = 0; p_.stat_tensor && i < N; ++i) {
      f.stat_tensor.push_back(p_.stat_tensor[row(p_.stat_strides, b, s, i, h)]);
    }
    f.forward();
    const Real sequences = static_cast<Real>(p_.space * (p_.map_heads > 1 ? 1 : p_.heads));
    for (int64_t cell = 0; p_.map_block && cell < N * N; ++cell) {
      results.map[map_cell(b, h, cell)] += f.weights[cell] / sequences;
    }
    for (int64_t i = 0; i < N * D; ++i) {
      results.out[row(p_.query_strides, b, s, i / D, h) + i % D] = f.out[i];
    }
    if (!backward) return;
    Numbers<Real> through_map(N * N, 0);
    for (int64_t cell = 0; backward->grad_map && cell < N * N; ++cell) {
      through_map[cell] = backward->grad_map[map_cell(b, h, cell)] / sequences;
    }
    f.backward(read<Real>(backward->grad_out, backward->grad_out_strides,
                          backward->grad_out_dim_stride, b, s, h),
               through_map);
    for (int64_t i = 0; i < N * D; ++i) {
      const int64_t at = row(p_.query_strides, b, s, i / D, h) + i % D;
      results.grad_query[at] = f.grad_query[i];
      results.grad_key[at] = f.grad_key[i];
      results.grad_value[at] = f.grad_value[i];
    }
    for (int64_t i = 0; p_.stat_tensor && i < N; ++i) {
      results.grad_stat[row(p_.stat_strides, b, s, i, h)] = f.grad_stat[i];
    }
    for (int64_t cell = 0; p_.delta && cell < N * N; ++cell) {
      results.grad_delta[delta_at(h, cell / N, cell % N)] += f.grad_delta[cell];
    }
  }

  // Returns where the map holds a cell of the N x N weights of head h of batch element b.
  int64_t map_cell(int64_t b, int64_t h, int64_t cell) const {
    const int64_t i = cell / p_.frames / p_.map_block, j = cell % p_.frames / p_.map_block;
    const int64_t map = b * p_.map_heads + (p_.map_heads > 1 ? h : 0);
    return (map * p_.map_blocks + i) * p_.map_blocks + j;
  }

  // Returns where Δ of query i and key j is in its user's layout, as bias.py says it.
  int64_t delta_at(int64_t h, int64_t i, int64_t j) const {
    const int64_t head = delta_.heads > 1 ? h * delta_.head_stride : 0;
    switch (delta_.form) {
      case vstar::Form::symmetric: return head + (i > j ? i - j : j - i);
      case vstar::Form::dense: return head + i * p_.frames + j;
      default: return head + (delta_.length - 1) / 2 + j - i;
    }
  }
  static int64_t row(const vstar::Strides& strides, int64_t b, int64_t s, int64_t n, int64_t h) {
    return b * strides.batch + s * strides.space + n * strides.frame + h * strides.head;
  }
  template <typename Real>
  Numbers<Real> read(const void* tensor, const vstar::Strides& strides, int64_t dim_stride,
                     int64_t b, int64_t s, int64_t h) const {
    Numbers<Real> x;
    for (int64_t i = 0; i < p_.frames * p_.head_dim; ++i) {
      const int64_t at = row(strides, b, s, i / p_.head_dim, h) + i % p_.head_dim * dim_stride;
      x.push_back(static_cast<const float*>(tensor)[at]);
    }
    return x;
  }

  const vstar::Problem& p_;
  const vstar::UserDelta& delta_;
};
