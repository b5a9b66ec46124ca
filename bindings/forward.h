// The row-panel algorithm of temporal attention regularization, once for every instruction set.
//
// A translation unit includes one simd_*.h, defines VSTAR_ISA as its namespace, then includes this.
//
// A *panel* is one or two vectors of queries. All its logits stay in the nearest caches, with the
// queries along the lanes and one row per key:
//
//     logits[j][i] = (scale * log2 e) q_i . k_j        keys broadcast against packed queries
//     m_i  = max_j logits[j][i]                        exact: the whole row is there
//     logits[j][i] += strength * stat_i * bias(j, i)   a shifted row of the Toeplitz table
//     logits[j][i]  = 2^(logits[j][i] - max_j)
//     out_i = sum_j logits[j][i] v_j / sum_j logits[j][i]
//
// so no step needs a sum or a maximum across lanes, and neither K nor V is transposed. The order of
// the operations on one row depends on nothing but N and head_dim: not on its neighbours, its
// panel, or the number of threads.
#pragma once

#include "microkernels.h"
#include "prefetch.h"

namespace vstar::VSTAR_ISA {

constexpr int kMaxPanelRows = kMaxVectors * kLanes;
constexpr int kMaxGroup = 4;  // panels that share one pass over K and V
// K and V up to this size (bytes of one of them in float32) are read once for each panel.
constexpr int64_t kResidentBytes = 64 << 10;
constexpr int64_t kGroupLogitBytes = 256 << 10;

// Rows up to this many are used where they lie: they stay in the first cache at any stride.
constexpr int64_t kUnpackedFrames = 32;
// The next sequence is fetched ahead when its four tensors' rows take no more than this.
constexpr int64_t kPrefetchBytes = 256 << 10;

struct Panel {
  int64_t row;  // its first query
  int count;    // queries
  int vectors;
  float* queries;
  float* logits;
  float* row_max;
  float* weight;
  float* inverse_sum;
  float* partial;

  int lanes() const { return vectors * kLanes; }
};

// How one call is cut, and where each part of a thread's scratch begins (in floats).
struct Plan {
  int64_t group;  // panels that share one pass over K and V
  int64_t padded_dim;
  int64_t queries, logits, partial, keys, values, per_row, size;

  explicit Plan(const ForwardArgs& a) {
    const int64_t logit_bytes = a.frames * kMaxPanelRows * 4;
    const bool resident = a.frames * a.head_dim * 4 <= kResidentBytes;
    group = resident ? 1 : min64(kMaxGroup, kGroupLogitBytes / logit_bytes);
    if (group < 1) group = 1;
    padded_dim = round_up(a.head_dim, kLanes);
    const int64_t rows = group * kMaxPanelRows;
    size = 0;
    queries = take(rows * a.head_dim);
    logits = take(rows * a.frames);
    partial = take(rows * padded_dim);
    keys = take(a.frames * a.head_dim);
    values = take(a.frames * a.head_dim);
    per_row = take(3 * rows);
  }

  Panel panel(const ForwardArgs& a, float* scratch, int64_t index, int64_t row,
              int64_t rows) const {
    float* statistics = scratch + per_row + 3 * index * kMaxPanelRows;
    return {row,
            static_cast<int>(min64(rows, kMaxPanelRows)),
            rows > kLanes ? 2 : 1,
            scratch + queries + index * kMaxPanelRows * a.head_dim,
            scratch + logits + index * kMaxPanelRows * a.frames,
            statistics,
            statistics + kMaxPanelRows,
            statistics + 2 * kMaxPanelRows,
            scratch + partial + index * kMaxPanelRows * padded_dim};
  }

 private:
  int64_t take(int64_t floats) {
    const int64_t start = size;
    size += round_up(floats, 16);  // a cache line
    return start;
  }
};

// Which (batch, space, head) a sequence is.
struct Place {
  int64_t batch, space, head;

  Place(const ForwardArgs& a, int64_t index)
      : batch(index / a.heads / a.space), space(index / a.heads % a.space), head(index % a.heads) {}

  int64_t offset(const Strides& s) const {
    return batch * s.batch + space * s.space + head * s.head;
  }
  template <typename T>
  T* in(T* tensor, const Strides& s) const {
    return tensor + offset(s);
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

// Rows of K or V in units: the tensor's own, or a packed copy.
template <typename Unit>
struct Rows {
  const Unit* data;
  int64_t stride;  // units

  template <typename T>
  Rows(const ForwardArgs& a, const T* rows, int64_t row_stride, float* scratch) {
    using Read = Reading<T, Unit>;
    const bool near = a.frames <= kUnpackedFrames || row_stride == a.head_dim;
    if (Read::kInPlace && near && row_stride % Read::kElements == 0) {
      data = reinterpret_cast<const Unit*>(rows);
      stride = row_stride / Read::kElements;
    } else {
      stride = a.head_dim / Read::kElements;
      pack_rows<typename Read::Source>(rows, row_stride, a.frames, stride, scratch);
      data = reinterpret_cast<const Unit*>(scratch);
    }
  }

  const Unit* from(int64_t row) const { return data + row * stride; }
};

// One sequence of T, its QK' computed in Units.
template <typename T, typename Unit>
class Sequence {
 public:
  Sequence(const ForwardArgs& args, const Plan& plan, int64_t index, float* scratch)
      : a_(args),
        plan_(plan),
        scratch_(scratch),
        place_(args, index),
        query_(place_.in(static_cast<const T*>(args.query), args.query_strides)),
        out_(place_.in(static_cast<T*>(args.out), args.out_strides)),
        keys_(args, place_.in(static_cast<const T*>(args.key), args.key_strides),
              args.key_strides.frame, scratch + plan.keys),
        values_(args, place_.in(static_cast<const T*>(args.value), args.value_strides),
                args.value_strides.frame, scratch + plan.values) {}

  void fetch_ahead(int64_t index) {
    constexpr int64_t size = sizeof(T);
    const int64_t row_bytes = a_.head_dim * size;
    if (4 * a_.frames * row_bytes > kPrefetchBytes) return;
    const Place next(a_, index);
    const void* const rows[4] = {next.in(static_cast<const T*>(a_.query), a_.query_strides),
                                 next.in(static_cast<const T*>(a_.key), a_.key_strides),
                                 next.in(static_cast<const T*>(a_.value), a_.value_strides),
                                 next.in(static_cast<const T*>(a_.out), a_.out_strides)};
    const int64_t strides[4] = {a_.query_strides.frame * size, a_.key_strides.frame * size,
                                a_.value_strides.frame * size, a_.out_strides.frame * size};
    const int64_t panels = (a_.frames + kMaxPanelRows - 1) / kMaxPanelRows;
    const int64_t logits_steps = (a_.frames + kKeyRows - 1) / kKeyRows;
    const int64_t steps = panels * (logits_steps + value_tiles(a_.head_dim));
    ahead_ = Prefetcher(rows, strides, a_.frames, row_bytes, steps);
  }

  // The map's largest logit (times log2 e).
  float map_max() {
    float result = -kInfinity;
    Panel panels[kMaxGroup];
    for (int64_t row = 0; row < a_.frames;) {
      const int count = next_panels(row, a_.frames, panels);
      compute_logits(panels, count);
      for (int p = 0; p < count; ++p) {
        for (int i = 0; i < panels[p].count; ++i) {
          if (panels[p].row_max[i] > result) result = panels[p].row_max[i];
        }
        row += panels[p].count;
      }
    }
    return result;
  }

  // The output rows [row, end).
  void compute(int64_t row, int64_t end) {
    const bool needs_map_max = a_.bias && a_.stat == Stat::map_max;
    const float stat_of_map = needs_map_max ? map_max() : 0.0f;
    Panel panels[kMaxGroup];
    while (row < end) {
      const int count = next_panels(row, end, panels);
      compute_logits(panels, count);
      for (int p = 0; p < count; ++p) {
        const Panel& panel = panels[p];
        if (a_.bias) regularize(panel, stat_of_map);
        const auto apply = panel.vectors == 1 ? exponentiate<1> : exponentiate<2>;
        apply(a_.frames, panel.row_max, panel.logits, panel.inverse_sum);
        row += panel.count;
      }
      compute_out(panels, count);
    }
  }

 private:
  int next_panels(int64_t row, int64_t end, Panel* panels) const {
    int count = 0;
    while (count < plan_.group && row < end) {
      panels[count] = plan_.panel(a_, scratch_, count, row, end - row);
      row += panels[count++].count;
    }
    return count;
  }

  void compute_logits(const Panel* panels, int count) {
    using Read = Reading<T, Unit>;
    const int64_t units = a_.head_dim / Read::kElements;
    const float scale = a_.scale * kLog2E;
    for (int p = 0; p < count; ++p) {
      const Panel& panel = panels[p];
      pack_queries<typename Read::Source>(query_ + panel.row * a_.query_strides.frame,
                                          a_.query_strides.frame, panel.count, panel.lanes(), units,
                                          scale, panel.queries);
      for (int i = 0; i < panel.lanes(); ++i) panel.row_max[i] = -kInfinity;
    }
    for (int64_t j = 0; j < a_.frames; j += kKeyRows) {
      const int rows = static_cast<int>(min64(kKeyRows, a_.frames - j));
      for (int p = 0; p < count; ++p) {
        const Panel& panel = panels[p];
        ahead_.step();
        const auto multiply = panel.vectors == 1 ? logits_rows<1, Unit> : logits_rows<2, Unit>;
        multiply(keys_.from(j), keys_.stride, rows, panel.queries, units, scale,
                 panel.logits + j * panel.lanes(), panel.row_max);
      }
    }
  }

  // logits += strength * stat * bias; the statistic is in the logits' unit, log2 e times the scaled
  // ones.
  void regularize(const Panel& panel, float stat_of_map) const {
    for (int i = 0; i < panel.count; ++i) {
      float stat = 0.0f;
      switch (a_.stat) {
        case Stat::none: stat = kLog2E; break;
        case Stat::row_max: stat = panel.row_max[i]; break;
        case Stat::map_max: stat = stat_of_map; break;
        case Stat::tensor:
          stat = place_.in(a_.stat_values,
                           a_.stat_strides)[(panel.row + i) * a_.stat_strides.frame] *
                 kLog2E;
          break;
      }
      if (a_.clamp_negative && stat < 0.0f) stat = 0.0f;
      panel.weight[i] = a_.strength * stat;
    }
    for (int i = panel.count; i < panel.lanes(); ++i) panel.weight[i] = 0.0f;
    const float* bias = a_.bias + place_.head * a_.bias_head_stride + panel.row;
    const auto add = panel.vectors == 1 ? add_bias<1> : add_bias<2>;
    add(bias, a_.bias_key_stride, a_.frames, panel.count, panel.weight, panel.logits,
        panel.row_max);
  }

  void compute_out(const Panel* panels, int count) {
    for (int64_t j = 0; j < a_.frames; j += kKeyBlock) {
      const int64_t keys = min64(kKeyBlock, a_.frames - j);
      for (int p = 0; p < count; ++p) {
        const Panel& panel = panels[p];
        const OutTile<T> tile = {out_ + panel.row * a_.out_strides.frame,
                                 a_.out_strides.frame,
                                 panel.partial,
                                 plan_.padded_dim,
                                 panel.inverse_sum,
                                 panel.count,
                                 j == 0,
                                 j + keys == a_.frames};
        values_panel(panel.logits + j * panel.lanes(), panel.lanes(), values_.from(j),
                     values_.stride, keys, a_.head_dim, tile, [this] { ahead_.step(); });
      }
    }
  }

  const ForwardArgs& a_;
  const Plan& plan_;
  float* scratch_;
  Place place_;
  const T* query_;
  T* out_;
  Rows<Unit> keys_;
  Rows<float> values_;
  Prefetcher ahead_;
};

template <typename T, typename Unit>
void forward_typed(const ForwardArgs& a, int64_t first, int64_t last, float* scratch) {
  const Plan plan(a);
  const int64_t items_per_sequence = (a.frames + a.rows_per_item - 1) / a.rows_per_item;
  while (first < last) {
    const int64_t index = first / items_per_sequence;
    const int64_t item = first % items_per_sequence;
    const int64_t items = min64(items_per_sequence - item, last - first);
    first += items;
    Sequence<T, Unit> sequence(a, plan, index, scratch);
    if (first < last) sequence.fetch_ahead(index + 1);
    sequence.compute(item * a.rows_per_item, min64((item + items) * a.rows_per_item, a.frames));
  }
}

inline void forward(const ForwardArgs& a, int64_t first, int64_t last, float* scratch) {
  switch (a.type) {
    case ScalarType::float32: return forward_typed<float, float>(a, first, last, scratch);
    case ScalarType::bfloat16:
#if defined(VSTAR_BFLOAT16_PAIRS)
      if (a.head_dim % 2 == 0) return forward_typed<bfloat16, Pair>(a, first, last, scratch);
#endif
      return forward_typed<bfloat16, float>(a, first, last, scratch);
    case ScalarType::float16: return forward_typed<float16, float>(a, first, last, scratch);
  }
}

inline int64_t forward_scratch(const ForwardArgs& a) { return Plan(a).size; }

inline void exp2(const float* in, float* out, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const int n = static_cast<int>(min64(kLanes, count - i));
    store_partial(out + i, exp2_nonpositive(load_partial(in + i, n)), n);
  }
}

}  // namespace vstar::VSTAR_ISA
