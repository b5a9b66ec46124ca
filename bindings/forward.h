// The row-panel algorithm of temporal attention regularization, once for every instruction set.
//
// A translation unit defines VSTAR_ISA as its namespace, includes one simd_*.h, then includes this.
//
// attention_weights.h computes a panel's weights; then, with the queries still along the lanes,
//
//     out_i = sum_j weights[j][i] v_j / sum_j weights[j][i]
//
// and where the mean map is wanted, the normalised weights are added up over the sequences that it is
// the mean of, a vector of queries at a time, and the sums are transposed at the end.
#pragma once

#include "attention_weights.h"

namespace vstar::VSTAR_ISA {

// K and V up to this size (bytes of one of them in float32) are read once for each panel.
constexpr int64_t kResidentBytes = 64 << 10;
constexpr int64_t kPanelsLogitBytes = 256 << 10;

struct ForwardPlan : PanelPlan {
  int64_t partial;
  int64_t map_queries, map_sums;  // map_queries floats for each block of keys

  explicit ForwardPlan(const ForwardArgs& a) : PanelPlan(a, panels_at_once(a)) {
    partial = take(panels * kPanelQueries * padded_dim);
    map_queries = round_up(a.queries_per_item, kLanes);
    map_sums = take(round_up(a.map_blocks, kLanes) * map_queries);
  }

 private:
  // Returns how many panels share one pass over K and V.
  static int64_t panels_at_once(const ForwardArgs& a) {
    if (a.frames * a.head_dim * 4 <= kResidentBytes) return 1;
    const int64_t panels = kPanelsLogitBytes / (a.frames * kPanelQueries * 4);
    return panels < 1 ? 1 : min64(kMaxPanels, panels);
  }
};

// Computes the output of one sequence.
template <typename T, typename Unit>
class SequenceForward {
 public:
  SequenceForward(const ForwardArgs& args, const ForwardPlan& plan, int64_t sequence,
                  float* scratch)
      : a_(args),
        plan_(plan),
        partial_(scratch + plan.partial),
        index_(args, sequence),
        weights_(args, plan, index_, scratch),
        values_(index_.in<T>(args.value, args.value_strides), args.value_strides.frame, args.frames,
                args.head_dim, scratch + plan.values, plan.unpacked_bytes),
        past_caches_(can_pass_caches<T>(args, args.out, args.out_strides)) {}

  // Fetches the rows of the sequence that comes next while this one is computed.
  void fetch_ahead(int64_t next_sequence) {
    const int64_t row_bytes = a_.head_dim * static_cast<int64_t>(sizeof(T));
    if (a_.frames * row_bytes > kPrefetchBytes) return;
    const SequenceIndex next(a_, next_sequence);
    const RowStream streams[] = {
        next.stream<T>(a_.query, a_.query_strides), next.stream<T>(a_.key, a_.key_strides),
        next.stream<T>(a_.value, a_.value_strides), next.stream<T>(a_.out, a_.out_strides)};
    prefetcher_ = Prefetcher(streams, a_.frames, row_bytes,
                             logits_steps(a_.frames) + product_tiles(a_.frames, a_.head_dim),
                             past_caches_ ? 3 : 4);
  }

  // Computes the outputs of queries [query_begin, query_end). Where `map_sums` is not null, their
  // weights are added to those sums, the first of which are query_begin's.
  void compute(int64_t query_begin, int64_t query_end, float* map_sums) {
    const MapMax map_max = weights_.map_max(prefetcher_);
    Panel panels[kMaxPanels];
    while (query_begin < query_end) {
      const int count = weights_.lay_out(query_begin, query_end, panels);
      weights_.compute_logits(panels, count, prefetcher_);
      for (int p = 0; p < count; ++p) {
        const Panel& panel = panels[p];
        weights_.exponentiate_logits(panel, map_max);
        if (map_sums) {
          add_to_map(panel, map_sums);
          map_sums += panel.query_count;
        }
        query_begin += panel.query_count;
      }
      compute_out(panels, count);
    }
  }

 private:
  void add_to_map(const Panel& panel, float* map_sums) const {
    with_vectors(panel.vectors, [&](auto vectors) {
      if (a_.map_block == 1) {
        add_to_sums<vectors>(a_.frames, panel.inverse_sum, panel.logits, plan_.map_queries,
                             plan_.map_queries, map_sums);
      } else {
        add_to_block_sums<vectors>(a_.frames, a_.map_block, panel.inverse_sum, panel.logits,
                                   plan_.map_queries, map_sums);
      }
    });
  }

  void compute_out(const Panel* panels, int count) {
    T* out = index_.in(static_cast<T*>(a_.out), a_.out_strides);
    for (int64_t j = 0; j < a_.frames; j += kKeyBlock) {
      for (int p = 0; p < count; ++p) {
        const Panel& panel = panels[p];
        const ProductOut<T> panel_out = {out + panel.query_begin * a_.out_strides.frame,
                                         a_.out_strides.frame,
                                         partial_ + p * kPanelQueries * plan_.padded_dim,
                                         plan_.padded_dim,
                                         panel.inverse_sum,
                                         1,
                                         past_caches_};
        product_over_keys(panel, panel.logits, values_, j, a_.frames, a_.head_dim, panel_out,
                          prefetcher_);
      }
    }
  }

  const ForwardArgs& a_;
  const ForwardPlan& plan_;
  float* partial_;
  SequenceIndex index_;
  AttentionWeights<T, Unit> weights_;
  UnitRows<float> values_;
  bool past_caches_;
  Prefetcher prefetcher_;
};

template <typename T, typename Unit>
void forward_typed(Types<T, Unit>, const ForwardArgs& a, int64_t begin, int64_t end,
                   float* scratch) {
  const ForwardPlan plan(a);
  const int64_t items_per_sequence = divide_up(a.frames, a.queries_per_item);
  while (begin < end) {
    const int64_t index = begin / items_per_sequence;
    const int64_t item = begin % items_per_sequence;
    const int64_t items = min64(items_per_sequence - item, end - begin);
    begin += items;
    SequenceForward<T, Unit> sequence(a, plan, index, scratch);
    if (begin < end) sequence.fetch_ahead(index + 1);
    sequence.compute(item * a.queries_per_item,
                     min64((item + items) * a.queries_per_item, a.frames), nullptr);
  }
  finish_stores();
}

// Writes a slice of the map of blocks of frames: the sums over each block's queries, divided by the
// number of sequences.
inline void write_block_map(const ForwardArgs& a, const MapSlice& slice, const float* sums,
                            int64_t map_queries) {
  const double sequences = static_cast<double>(a.space * a.heads / a.map_heads);
  float* cell = slice.map;
  for (int64_t begin = slice.query_begin; begin < slice.query_end; begin += a.map_block) {
    const int64_t end = min64(begin + a.map_block, slice.query_end);
    for (int64_t block = 0; block < a.map_blocks; ++block, ++cell) {
      double sum = 0;
      for (int64_t query = begin; query < end; ++query) {
        sum += sums[block * map_queries + query - slice.query_begin];
      }
      const float mean = static_cast<float>(sum / sequences);
      *cell = slice.accumulate ? *cell + mean : mean;
    }
  }
}

// Writes a slice of the mean map: the sums' transpose, divided by the number of sequences.
inline void write_map(const ForwardArgs& a, const MapSlice& slice, const float* sums,
                      int64_t map_queries) {
  const Vec factor = broadcast(1.0f / static_cast<float>(a.space * a.heads / a.map_heads));
  for (int64_t query = slice.query_begin; query < slice.query_end;
       query += kLanes, sums += kLanes) {
    const int queries = static_cast<int>(min64(kLanes, slice.query_end - query));
    for (int64_t key = 0; key < a.frames; key += kLanes) {
      const int keys = static_cast<int>(min64(kLanes, a.frames - key));
      Vec block[kLanes];
      for (int j = 0; j < kLanes; ++j) block[j] = load(sums + (key + j) * map_queries);
      transpose(block);
      for (int i = 0; i < queries; ++i) {
        float* cell = slice.map + (query + i - slice.query_begin) * a.frames + key;
        Vec mean = mul(block[i], factor);
        if (slice.accumulate) mean = add(mean, load_partial(cell, keys));
        store_partial(cell, mean, keys);
      }
    }
  }
}

template <typename T, typename Unit>
void forward_map_typed(Types<T, Unit>, const ForwardArgs& a, const MapSlice& slice,
                       float* scratch) {
  const ForwardPlan plan(a);
  float* sums = scratch + plan.map_sums;
  for (int64_t i = 0; i < a.map_blocks * plan.map_queries; i += kLanes) store(sums + i, zero());
  for (int64_t index = slice.sequence_begin; index < slice.sequence_end; index += a.map_heads) {
    SequenceForward<T, Unit> sequence(a, plan, index, scratch);
    // Often the next slice is this thread's too.
    const int64_t next = index + a.map_heads;
    if (next < a.batch * a.space * a.heads) sequence.fetch_ahead(next);
    sequence.compute(slice.query_begin, slice.query_end, sums);
  }
  finish_stores();
  const auto write = a.map_block == 1 ? write_map : write_block_map;
  write(a, slice, sums, plan.map_queries);
}

inline void forward(const ForwardArgs& a, int64_t begin, int64_t end, float* scratch) {
  with_types(a.type, a.head_dim, [&](auto types) { forward_typed(types, a, begin, end, scratch); });
}

inline void forward_map(const ForwardArgs& a, const MapSlice& slice, float* scratch) {
  with_types(a.type, a.head_dim, [&](auto types) { forward_map_typed(types, a, slice, scratch); });
}

inline int64_t forward_scratch(const ForwardArgs& a) { return ForwardPlan(a).size; }

inline void exp2(const float* in, float* out, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const int n = static_cast<int>(min64(kLanes, count - i));
    store_partial(out + i, exp2_nonpositive(load_partial(in + i, n)), n);
  }
}

}  // namespace vstar::VSTAR_ISA
