// The attention weights of a panel, which both directions compute first.
//
// A *panel* is one or two vectors of queries. All its logits stay in the nearest caches, with the
// queries along the lanes and one row per key:
//
//     logits[j][i] = (scale * log2 e) q_i . k_j        keys broadcast against packed queries
//     m_i  = max_j logits[j][i]                        exact: the whole row is there
//     logits[j][i] += strength * stat_i * bias(j, i)   a shifted row of the Toeplitz table
//     logits[j][i]  = 2^(logits[j][i] - max_j)         the weights, up to one over their sum
//
// so no step needs a sum or a maximum across lanes, and neither K nor V is transposed. The order of
// the operations on one row depends on nothing but N and head_dim: not on its neighbours, its
// panel, or the number of threads.
#pragma once

#include "microkernels.h"
#include "prefetch.h"

namespace vstar::VSTAR_ISA {

constexpr int kMaxPanelRows = kMaxVectors * kLanes;
constexpr int kMaxGroup = 4;  // panels that are there at once
// Rows up to this many are used where they lie: they stay in the first cache at any stride.
constexpr int64_t kUnpackedRows = 32;
// The next sequence is fetched ahead when one of its tensors' rows take no more than this.
constexpr int64_t kPrefetchBytes = 64 << 10;

struct Panel {
  int64_t row;  // its first query
  int count;    // queries
  int vectors;
  float* queries;
  float* logits;
  float* row_max;
  float* stat;  // of the logits, times log2 e, before it is clamped
  float* weight;
  float* inverse_sum;

  int lanes() const { return vectors * kLanes; }
};

// Where each part of a thread's scratch begins (in floats): those that both directions have.
struct PanelPlan {
  int64_t group;        // panels that are there at once, at most kMaxGroup
  int64_t padded_keys;  // rows of logits, in whole tiles of products over queries
  int64_t padded_dim;
  int64_t queries, logits, keys, values, per_row;
  int64_t size = 0;

  PanelPlan(const Problem& p, int64_t panels)
      : group(panels),
        padded_keys(round_up(p.frames, kQueryRows)),
        padded_dim(round_up(p.head_dim, kLanes)) {
    const int64_t rows = group * kMaxPanelRows;
    queries = take(rows * p.head_dim);
    logits = take(rows * padded_keys);
    keys = take(p.frames * p.head_dim);
    values = take(p.frames * p.head_dim);
    per_row = take(kPerRow * rows);
  }

  int64_t take(int64_t floats) {
    const int64_t start = size;
    size += round_up(floats, 16);  // a cache line
    return start;
  }

  // The first `rows` queries from `row` on, or as many as go in.
  Panel panel(const Problem& p, float* scratch, int64_t index, int64_t row, int64_t rows) const {
    float* statistics = scratch + per_row + kPerRow * index * kMaxPanelRows;
    return {row,
            static_cast<int>(min64(rows, kMaxPanelRows)),
            rows > kLanes ? 2 : 1,
            scratch + queries + index * kMaxPanelRows * p.head_dim,
            scratch + logits + index * kMaxPanelRows * padded_keys,
            statistics,
            statistics + kMaxPanelRows,
            statistics + 2 * kMaxPanelRows,
            statistics + 3 * kMaxPanelRows};
  }

 private:
  static constexpr int64_t kPerRow = 4;
};

// Which (batch, space, head) a sequence is.
struct Place {
  int64_t batch, space, head;

  Place(const Problem& p, int64_t index)
      : batch(index / p.heads / p.space), space(index / p.heads % p.space), head(index % p.heads) {}

  template <typename T>
  T* in(T* tensor, const Strides& s) const {
    return tensor + batch * s.batch + space * s.space + head * s.head;
  }
  template <typename T>
  const T* in(const void* tensor, const Strides& s) const {
    return in(static_cast<const T*>(tensor), s);
  }
  template <typename T>
  RowStream stream(const void* tensor, const Strides& s) const {
    return {in<T>(tensor, s), s.frame * static_cast<int64_t>(sizeof(T))};
  }
};

// How rows of T are read to compute in Units: as Units where they hold those in memory, else
// converted, one unit an element.
template <typename T, typename Unit>
struct Reading {
  using Source = T;
  static constexpr int64_t kElements = 1;  // of a unit
  static constexpr bool kInPlace = false;
};
template <>
struct Reading<float, float> {
  using Source = float;
  static constexpr int64_t kElements = 1;
  static constexpr bool kInPlace = true;
};
#if defined(VSTAR_BFLOAT16_PAIRS)
template <>
struct Reading<bfloat16, Pair> {
  using Source = Pair;
  static constexpr int64_t kElements = 2;
  static constexpr bool kInPlace = true;
};
#endif

// `count` rows in units: the tensor's own, or a packed copy.
template <typename Unit>
struct Rows {
  const Unit* data;
  int64_t stride;  // units

  template <typename T>
  Rows(const T* rows, int64_t row_stride, int64_t count, int64_t head_dim, float* scratch) {
    using Read = Reading<T, Unit>;
    const bool near = count <= kUnpackedRows || row_stride == head_dim;
    if (Read::kInPlace && near && row_stride % Read::kElements == 0) {
      data = reinterpret_cast<const Unit*>(rows);
      stride = row_stride / Read::kElements;
    } else {
      stride = head_dim / Read::kElements;
      pack_rows<typename Read::Source>(rows, row_stride, count, stride, scratch);
      data = reinterpret_cast<const Unit*>(scratch);
    }
  }

  const Unit* from(int64_t row) const { return data + row * stride; }
};

// The largest logit of a map and its query, the first if there are several.
struct MapMax {
  float value = -kInfinity;  // times log2 e
  int64_t row = 0;
};

// One sequence's weights, panel by panel. Its tensors hold T; QK' is computed in Units.
template <typename T, typename Unit>
class Weights {
 public:
  Weights(const Problem& problem, const PanelPlan& plan, const Place& place, float* scratch)
      : p_(problem),
        plan_(plan),
        place_(place),
        scratch_(scratch),
        query_(place.in<T>(problem.query, problem.query_strides)),
        keys_(place.in<T>(problem.key, problem.key_strides), problem.key_strides.frame,
              problem.frames, problem.head_dim, scratch + plan.keys) {}

  // The next panels from `row` on, as many as go in; returns how many.
  int panels(int64_t row, int64_t end, Panel* panels) const {
    int count = 0;
    while (count < plan_.group && row < end) {
      panels[count] = plan_.panel(p_, scratch_, count, row, end - row);
      row += panels[count++].count;
    }
    return count;
  }

  void compute_logits(const Panel* panels, int count, Prefetcher& ahead) const {
    using Read = Reading<T, Unit>;
    const int64_t units = p_.head_dim / Read::kElements;
    for (int p = 0; p < count; ++p) {
      const Panel& panel = panels[p];
      pack_queries<typename Read::Source>(query_ + panel.row * p_.query_strides.frame,
                                          p_.query_strides.frame, panel.count, panel.lanes(), units,
                                          panel.queries);
      for (int i = 0; i < panel.lanes(); ++i) panel.row_max[i] = -kInfinity;
    }
    for (int64_t j = 0; j < p_.frames; j += kKeyRows) {
      const int rows = static_cast<int>(min64(kKeyRows, p_.frames - j));
      for (int p = 0; p < count; ++p) {
        const Panel& panel = panels[p];
        ahead.step();
        const auto multiply = panel.vectors == 1 ? logits_rows<1, Unit> : logits_rows<2, Unit>;
        multiply(keys_.from(j), keys_.stride, rows, panel.queries, units, p_.scale * kLog2E,
                 panel.logits + j * panel.lanes(), panel.row_max);
      }
    }
  }

  // Where the bias needs it; it computes all logits.
  MapMax map_max(Prefetcher& ahead) const {
    MapMax result;
    if (!p_.bias || p_.stat != Stat::map_max) return result;
    Panel group[kMaxGroup];
    for (int64_t row = 0; row < p_.frames;) {
      const int count = panels(row, p_.frames, group);
      compute_logits(group, count, ahead);
      for (int p = 0; p < count; ++p) {
        for (int i = 0; i < group[p].count; ++i, ++row) {
          if (group[p].row_max[i] > result.value) result = {group[p].row_max[i], row};
        }
      }
    }
    return result;
  }

  // From a panel's logits and their maxima.
  void exponentiate_logits(const Panel& panel, const MapMax& map_max) const {
    if (p_.bias) regularize(panel, map_max);
    const auto apply = panel.vectors == 1 ? exponentiate<1> : exponentiate<2>;
    apply(p_.frames, panel.row_max, panel.logits, panel.inverse_sum);
  }

  const Rows<Unit>& keys() const { return keys_; }
  // The bias's first key for a panel's queries.
  const float* bias(const Panel& panel) const {
    return p_.bias + place_.head * p_.bias_head_stride + panel.row;
  }

 private:
  // logits += strength * stat * bias; the statistic is in the logits' unit, log2 e times the scaled
  // ones.
  void regularize(const Panel& panel, const MapMax& map_max) const {
    for (int i = 0; i < panel.count; ++i) {
      float stat = 0.0f;
      switch (p_.stat) {
        case Stat::none: stat = kLog2E; break;
        case Stat::row_max: stat = panel.row_max[i]; break;
        case Stat::map_max: stat = map_max.value; break;
        case Stat::tensor:
          stat = place_.in(p_.stat_values,
                           p_.stat_strides)[(panel.row + i) * p_.stat_strides.frame] *
                 kLog2E;
          break;
      }
      panel.stat[i] = stat;
      if (p_.clamp_negative && stat < 0.0f) stat = 0.0f;
      panel.weight[i] = p_.strength * stat;
    }
    for (int i = panel.count; i < panel.lanes(); ++i) panel.weight[i] = 0.0f;
    const auto add = panel.vectors == 1 ? add_bias<1> : add_bias<2>;
    add(bias(panel), p_.bias_key_stride, p_.frames, panel.count, panel.weight, panel.logits,
        panel.row_max);
  }

  const Problem& p_;
  const PanelPlan& plan_;
  Place place_;
  float* scratch_;
  const T* query_;
  Rows<Unit> keys_;
};

// A panel's rows of a product over one block of keys, from `key` on: scale * cells' x, where cells
// are laid out as the panel's logits. The last block writes `out`.
template <typename T>
void product_over_keys(const Panel& panel, const float* cells, const Rows<float>& x, int64_t key,
                       int64_t frames, int64_t head_dim, Target<T> out, Prefetcher& ahead) {
  const int64_t keys = min64(kKeyBlock, frames - key);
  out.rows = panel.count;
  out.first = key == 0;
  out.last = key + keys == frames;
  product<Over::keys>(cells + key * panel.lanes(), panel.lanes(), x.from(key), x.stride, keys,
                      head_dim, out, [&ahead] { ahead.step(); });
}

}  // namespace vstar::VSTAR_ISA
