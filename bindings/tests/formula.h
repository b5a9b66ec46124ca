// Temporal attention regularization and its gradients as plain loops, in any precision.
#pragma once

#include <cmath>
#include <vector>

#include "types.h"

template <typename Real>
using Numbers = std::vector<Real>;

// One sequence. Matrices are row by row; row i of an N x N one is query i.
template <typename Real>
struct Formula {
  int64_t N, D;
  Numbers<Real> query, key, value;
  Real scale, strength;
  Numbers<Real> bias;  // (N, N); empty: no regularization
  vstar::Stat stat;
  bool clamp_negative, detach_stat;
  Numbers<Real> stat_values;

  // Results.
  Numbers<Real> weights, out;
  Numbers<Real> grad_query, grad_key, grad_value, grad_bias, grad_stat;

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
      if (stat == vstar::Stat::tensor) stat_[i] = stat_values[i];
      softmax(i);
    }
    out = rows(weights, value, false);
  }

  // `grad_weights` (N, N) is what comes through the mean map.
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
    grad_bias.assign(N * N, 0);
    grad_stat.assign(N, 0);
    if (!bias.empty()) through_bias(grads);
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
      if (!bias.empty()) row[j] += strength * clamped(i) * bias[i * N + j];
      top = row[j] > top ? row[j] : top;
    }
    for (int64_t j = 0; j < N; ++j) sum += row[j] = std::exp(row[j] - top);
    for (int64_t j = 0; j < N; ++j) row[j] /= sum;
  }

  void through_bias(Numbers<Real>& grads) {
    Numbers<Real> to_stat(N, 0);
    for (int64_t i = 0; i < N; ++i) {
      for (int64_t j = 0; j < N; ++j) {
        grad_bias[i * N + j] = strength * clamped(i) * grads[i * N + j];
        to_stat[i] += strength * grads[i * N + j] * bias[i * N + j];
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

  // a b', (N, N)
  Numbers<Real> product(const Numbers<Real>& a, const Numbers<Real>& b) const {
    Numbers<Real> result(N * N, 0);
    for (int64_t i = 0; i < N; ++i)
      for (int64_t j = 0; j < N; ++j)
        for (int64_t d = 0; d < D; ++d) result[i * N + j] += a[i * D + d] * b[j * D + d];
    return result;
  }
  // m x or m' x, (N, D)
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
