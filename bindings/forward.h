// The row-panel algorithm of temporal attention regularization, once for every instruction set.
//
// A translation unit includes one simd_*.h, defines VSTAR_ISA as its namespace, then includes this.
//
// weights.h computes a panel's weights; then, with the queries still along the lanes,
//
//     out_i = sum_j weights[j][i] v_j / sum_j weights[j][i]
//
// and where the mean map is wanted, the normalised weights are added up over the sequences of one
// batch element, a row of lanes at a time, and the sums are transposed at the end.
#pragma once

#include "weights.h"

namespace vstar::VSTAR_ISA {

// K and V up to this size (bytes of one of them in float32) are read once for each panel.
constexpr int64_t kResidentBytes = 64 << 10;
constexpr int64_t kGroupLogitBytes = 256 << 10;

struct ForwardPlan : PanelPlan {
  int64_t partial;
  int64_t map_rows, map_sums;  // map_rows queries for each key

  explicit ForwardPlan(const ForwardArgs& a) : PanelPlan(a, panels_at_once(a)) {
    partial = take(group * kMaxPanelRows * padded_dim);
    map_rows = round_up(a.rows_per_item, kLanes);
    map_sums = take(a.wants_map ? round_up(a.frames, kLanes) * map_rows : 0);
  }

 private:
  // So many that share one pass over K and V.
  static int64_t panels_at_once(const ForwardArgs& a) {
    if (a.frames * a.head_dim * 4 <= kResidentBytes) return 1;
    const int64_t panels = kGroupLogitBytes / (a.frames * kMaxPanelRows * 4);
    return panels < 1 ? 1 : min64(kMaxGroup, panels);
  }
};

// The types of a call: its tensors hold T, and QK' is computed in Units.
template <typename T, typename Unit>
struct Types {};

template <typename Body>
void with_types(const Problem& p, const Body& body) {
  switch (p.type) {
    case ScalarType::float32: return body(Types<float, float>());
    case ScalarType::bfloat16:
#if defined(VSTAR_BFLOAT16_PAIRS)
      if (p.head_dim % 2 == 0) return body(Types<bfloat16, Pair>());
#endif
      return body(Types<bfloat16, float>());
    case ScalarType::float16: return body(Types<float16, float>());
  }
}

template <typename T, typename Unit>
class Sequence {
 public:
  Sequence(const ForwardArgs& args, const ForwardPlan& plan, int64_t index, float* scratch)
      : a_(args),
        plan_(plan),
        partial_(scratch + plan.partial),
        place_(args, index),
        weights_(args, plan, place_, scratch),
        values_(place_.in<T>(args.value, args.value_strides), args.value_strides.frame, args.frames,
                args.head_dim, scratch + plan.values) {}

  void fetch_ahead(int64_t index) {
    const int64_t row_bytes = a_.head_dim * static_cast<int64_t>(sizeof(T));
    if (a_.frames * row_bytes > kPrefetchBytes) return;
    const Place next(a_, index);
    const RowStream streams[] = {
        next.stream<T>(a_.query, a_.query_strides), next.stream<T>(a_.key, a_.key_strides),
        next.stream<T>(a_.value, a_.value_strides), next.stream<T>(a_.out, a_.out_strides)};
    const int64_t panels = (a_.frames + kMaxPanelRows - 1) / kMaxPanelRows;
    const int64_t logits_steps = (a_.frames + kKeyRows - 1) / kKeyRows;
    ahead_ = Prefetcher(streams, a_.frames, row_bytes,
                        panels * (logits_steps + column_tiles(a_.head_dim)));
  }

  // The output rows [row, end). With `map_sums` their weights are added to those, which begin with
  // `row`.
  void compute(int64_t row, int64_t end, float* map_sums) {
    const MapMax map_max = weights_.map_max(ahead_);
    Panel panels[kMaxGroup];
    while (row < end) {
      const int count = weights_.panels(row, end, panels);
      weights_.compute_logits(panels, count, ahead_);
      for (int p = 0; p < count; ++p) {
        const Panel& panel = panels[p];
        weights_.exponentiate_logits(panel, map_max);
        if (map_sums) {
          const auto add = panel.vectors == 1 ? add_to_sums<1> : add_to_sums<2>;
          add(a_.frames, panel.inverse_sum, panel.logits, plan_.map_rows, plan_.map_rows, map_sums);
          map_sums += panel.count;
        }
        row += panel.count;
      }
      compute_out(panels, count);
    }
  }

 private:
  void compute_out(const Panel* panels, int count) {
    T* out = place_.in(static_cast<T*>(a_.out), a_.out_strides);
    for (int64_t j = 0; j < a_.frames; j += kKeyBlock) {
      for (int p = 0; p < count; ++p) {
        const Panel& panel = panels[p];
        const Target<T> target = {out + panel.row * a_.out_strides.frame,
                                  a_.out_strides.frame,
                                  partial_ + p * kMaxPanelRows * plan_.padded_dim,
                                  plan_.padded_dim,
                                  panel.inverse_sum,
                                  1};
        product_over_keys(panel, panel.logits, values_, j, a_.frames, a_.head_dim, target, ahead_);
      }
    }
  }

  const ForwardArgs& a_;
  const ForwardPlan& plan_;
  float* partial_;
  Place place_;
  Weights<T, Unit> weights_;
  Rows<float> values_;
  Prefetcher ahead_;
};

template <typename T, typename Unit>
void forward_typed(Types<T, Unit>, const ForwardArgs& a, int64_t first, int64_t last,
                   float* scratch) {
  const ForwardPlan plan(a);
  const int64_t items_per_sequence = (a.frames + a.rows_per_item - 1) / a.rows_per_item;
  while (first < last) {
    const int64_t index = first / items_per_sequence;
    const int64_t item = first % items_per_sequence;
    const int64_t items = min64(items_per_sequence - item, last - first);
    first += items;
    Sequence<T, Unit> sequence(a, plan, index, scratch);
    if (first < last) sequence.fetch_ahead(index + 1);
    sequence.compute(item * a.rows_per_item, min64((item + items) * a.rows_per_item, a.frames),
                     nullptr);
  }
}

// The part's rows of map: the sums' transpose, divided by the number of sequences.
inline void write_map(const ForwardArgs& a, const MapPart& part, const float* sums, int64_t rows) {
  const Vec factor = broadcast(1.0f / static_cast<float>(a.space * a.heads));
  for (int64_t row = part.first_row; row < part.last_row; row += kLanes, sums += kLanes) {
    const int count = static_cast<int>(min64(kLanes, part.last_row - row));
    for (int64_t key = 0; key < a.frames; key += kLanes) {
      const int keys = static_cast<int>(min64(kLanes, a.frames - key));
      Vec block[kLanes];
      for (int j = 0; j < kLanes; ++j) block[j] = load(sums + (key + j) * rows);
      transpose(block);
      for (int i = 0; i < count; ++i) {
        float* cell = part.map + (row + i) * a.frames + key;
        Vec mean = mul(block[i], factor);
        if (part.add) mean = add(mean, load_partial(cell, keys));
        store_partial(cell, mean, keys);
      }
    }
  }
}

template <typename T, typename Unit>
void forward_map_typed(Types<T, Unit>, const ForwardArgs& a, const MapPart& part, float* scratch) {
  const ForwardPlan plan(a);
  float* sums = scratch + plan.map_sums;
  for (int64_t i = 0; i < a.frames * plan.map_rows; i += kLanes) store(sums + i, zero());
  for (int64_t index = part.first_sequence; index < part.last_sequence; ++index) {
    Sequence<T, Unit> sequence(a, plan, index, scratch);
    // Often the next part is this thread's too.
    if (index + 1 < a.batch * a.space * a.heads) sequence.fetch_ahead(index + 1);
    sequence.compute(part.first_row, part.last_row, sums);
  }
  write_map(a, part, sums, plan.map_rows);
}

inline void forward(const ForwardArgs& a, int64_t first, int64_t last, float* scratch) {
  with_types(a, [&](auto types) { forward_typed(types, a, first, last, scratch); });
}

inline void forward_map(const ForwardArgs& a, const MapPart& part, float* scratch) {
  with_types(a, [&](auto types) { forward_map_typed(types, a, part, scratch); });
}

inline int64_t forward_scratch(const ForwardArgs& a) { return ForwardPlan(a).size; }

inline void exp2(const float* in, float* out, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const int n = static_cast<int>(min64(kLanes, count - i));
    store_partial(out + i, exp2_nonpositive(load_partial(in + i, n)), n);
  }
}

}  // namespace vstar::VSTAR_ISA
