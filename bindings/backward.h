// The gradients of temporal attention regularization, once for every instruction set.
//
// Nothing is kept from the forward: a thread takes whole sequences, or where there are few of them
// parts of a sequence's queries, panel by panel, and computes a panel's weights again
// (attention_weights.h). With P the normalised weights, G the gradient to the mean map, and the
// panel's queries along the lanes:
//
//     dP[j][i] = v_j . do_i + G_ij / (maps in the mean)    values broadcast against packed rows
//     dS[j][i] = P[j][i] * (dP[j][i] - sum_k P dP)         the gradient to the regularized logits
//     dS[argmax_i][i] += strength * sum_k dS[k][i] delta   through m_i = max_j logits[j][i]
//     dv_j += sum_i P[j][i] do_i                           products over the panel's queries,
//     dk_j += scale * sum_i dS[j][i] q_i                   kept for all keys between panels
//     dq_i  = scale * sum_j dS[j][i] k_j                   a product over keys, as in the forward
//
// which is five products of the forward's size. A map_max takes the sum over all queries at the
// map's single maximum, whose panel therefore comes last, and is not computed in parts. Parts' sums
// of dk and dv are added up in their order when all are there. How a sequence is cut depends on the
// call's sizes, so that its bits do not depend on the number of threads.
#pragma once

#include "attention_weights.h"
#include "gradients.h"

namespace vstar::VSTAR_ISA {

struct BackwardPlan : PanelPlan {
  int64_t grads, grad_map;        // cells
  int64_t packed_grad_out;        // as a panel's queries
  int64_t query_rows, grad_rows;  // a panel's, where they cannot be used in place
  int64_t partial, key_sums;      // the values' sums follow those of the keys
  int64_t sums_of_one;
  int64_t argmax, sums;  // one float for each of a panel's queries

  explicit BackwardPlan(const BackwardArgs& a)
      : PanelPlan(a, 1), sums_of_one(padded_dim * padded_keys) {
    grads = take(padded_keys * kPanelQueries);
    grad_map = take(a.map_blocks * kPanelQueries);
    packed_grad_out = take(a.head_dim * kPanelQueries);
    query_rows = take(a.head_dim * kPanelQueries);
    grad_rows = take(a.head_dim * kPanelQueries);
    partial = take(padded_dim * kPanelQueries);
    key_sums = take(a.parts == 1 ? 2 * sums_of_one : 0);
    argmax = take(kPanelQueries);
    sums = take(kPanelQueries);
  }
};

// Computes the gradients of one sequence or a part of it. Its tensors hold T.
template <typename T>
class SequenceBackward {
 public:
  SequenceBackward(const BackwardArgs& args, const BackwardPlan& plan, int64_t item,
                   float* scratch)
      : a_(args),
        plan_(plan),
        scratch_(scratch),
        part_(item % args.parts),
        index_(args, item / args.parts),
        key_sums_(args.parts == 1 ? scratch + plan.key_sums
                                  : args.part_sums + item * 2 * plan.sums_of_one),
        value_sums_(key_sums_ + plan.sums_of_one),
        weights_(args, plan, index_, scratch),
        values_(index_.in<T>(args.value, args.value_strides), args.value_strides.frame, args.frames,
                args.head_dim, scratch + plan.values, plan.unpacked_bytes),
        grads_(scratch + plan.grads),
        argmax_(scratch + plan.argmax),
        sums_(scratch + plan.sums),
        past_caches_(can_pass_caches<T>(args, args.grad_query, args.grad_query_strides) &&
                     can_pass_caches<T>(args, args.grad_key, args.grad_key_strides) &&
                     can_pass_caches<T>(args, args.grad_value, args.grad_value_strides)) {}

  // Fetches the rows of the sequence that comes next while this one is computed.
  void fetch_ahead(int64_t next_sequence) {
    const int64_t row_bytes = a_.head_dim * static_cast<int64_t>(sizeof(T));
    if (a_.frames * row_bytes > kPrefetchBytes) return;
    const SequenceIndex next(a_, next_sequence);
    const RowStream streams[] = {next.stream<T>(a_.query, a_.query_strides),
                                 next.stream<T>(a_.key, a_.key_strides),
                                 next.stream<T>(a_.value, a_.value_strides),
                                 next.stream<T>(a_.grad_out, a_.grad_out_strides),
                                 next.stream<T>(a_.grad_query, a_.grad_query_strides),
                                 next.stream<T>(a_.grad_key, a_.grad_key_strides),
                                 next.stream<T>(a_.grad_value, a_.grad_value_strides)};
    const int64_t panels = divide_up(a_.frames, kPanelQueries);
    const int64_t steps = 2 * logits_steps(a_.frames) - panels +
                          (2 * panels + 1) * product_tiles(a_.frames, a_.head_dim);
    prefetcher_ = Prefetcher(streams, a_.frames, row_bytes, steps, past_caches_ ? 4 : 7);
  }

  void compute() {
    const MapMax map_max = weights_.map_max(prefetcher_);
    const int64_t panels = divide_up(a_.frames, kPanelQueries);
    const int64_t begin = panels * part_ / a_.parts, end = panels * (part_ + 1) / a_.parts;
    // Only the panel with the map's maximum needs to know what the others add to its gradient.
    const bool to_one_cell = through_stat() && a_.stat == Stat::map_max;
    const int64_t last = to_one_cell ? map_max.query / kPanelQueries : end - 1;
    bool is_first = true;
    for (int64_t p = begin; p < end; ++p) {
      if (p == last) continue;
      compute_panel(p, map_max, is_first, false);
      is_first = false;
    }
    compute_panel(last, map_max, is_first, a_.parts == 1);
  }

 private:
  // Computes one panel. The first one begins the sums over panels, and the last one of a whole
  // sequence writes them.
  void compute_panel(int64_t index, const MapMax& map_max, bool is_first, bool is_last) {
    const Panel panel = plan_.panel(a_, scratch_, 0, index * kPanelQueries, a_.frames);
    weights_.compute_logits(&panel, 1, prefetcher_);
    if (through_stat() && (a_.stat == Stat::row_max || (a_.stat == Stat::map_max && is_last))) {
      with_vectors(panel.vectors, [&](auto vectors) {
        row_argmax<vectors>(a_.frames, panel.logits, panel.row_max, argmax_);
      });
    }
    weights_.exponentiate_logits(panel, map_max);

    const UnitRows<float> grad_rows = rows_of_grad_out(panel);
    multiply_values(panel, grad_rows);
    if (a_.grad_map) add_map_gradient(panel);
    with_vectors(panel.vectors, [&](auto vectors) {
      softmax_gradient<vectors>(a_.frames, panel.inverse_sum, panel.logits, grads_, sums_);
    });
    add_values_gradient(panel, grad_rows, is_first, is_last);
    if (a_.delta_sums.data) add_delta_gradient(panel);
    if (through_stat()) add_stat_gradient(panel, map_max, is_last);
    add_keys_gradient(panel, is_first, is_last);
    write_query_gradient(panel);
  }

  // Returns whether a gradient goes through the statistic.
  bool through_stat() const {
    return a_.delta && !a_.detach_stat && (a_.stat != Stat::tensor || a_.grad_stat) &&
           a_.stat != Stat::none;
  }

  UnitRows<float> rows_of_grad_out(const Panel& panel) const {
    const T* rows = index_.in<T>(a_.grad_out, a_.grad_out_strides) +
                    panel.query_begin * a_.grad_out_strides.frame;
    float* packed = scratch_ + plan_.grad_rows;
    if (a_.grad_out_dim_stride == 1) {
      return UnitRows<float>(rows, a_.grad_out_strides.frame, panel.query_count, a_.head_dim,
                             packed);
    }
    gather_rows(rows, a_.grad_out_strides.frame, a_.grad_out_dim_stride, panel.query_count,
                a_.head_dim, packed);
    return UnitRows<float>(packed, a_.head_dim, panel.query_count, a_.head_dim, packed);
  }

  // Sets the cells' gradients to do v', the gradient to the weights.
  void multiply_values(const Panel& panel, const UnitRows<float>& grad_rows) {
    float* packed = scratch_ + plan_.packed_grad_out;
    pack_queries<float>(grad_rows.data, grad_rows.stride, panel.query_count, panel.lanes(),
                        a_.head_dim, packed);
    for (int64_t j = 0; j < a_.frames; j += panel.logits_keys()) {
      const int keys = static_cast<int>(min64(panel.logits_keys(), a_.frames - j));
      prefetcher_.step();
      with_vectors(panel.vectors, [&](auto vectors) {
        // The maxima are of no use here.
        logits_of_keys<vectors>(values_.from(j), values_.stride, keys, packed, a_.head_dim, 1.0f,
                                grads_ + j * panel.lanes(), sums_);
      });
    }
  }

  void add_map_gradient(const Panel& panel) {
    float* packed = scratch_ + plan_.grad_map;
    const int64_t blocks = a_.map_blocks;
    const int64_t head = a_.map_heads > 1 ? index_.head : 0;
    const float* map = a_.grad_map + (index_.batch * a_.map_heads + head) * blocks * blocks;
    if (a_.map_block == 1) {
      pack_queries<float>(map + panel.query_begin * blocks, blocks, panel.query_count,
                          panel.lanes(), blocks, packed);
    } else {
      for (int i = 0; i < panel.lanes(); ++i) {
        // What the lanes without a query hold does not matter.
        const int64_t query = min64(panel.query_begin + i, a_.frames - 1);
        const float* row = map + query / a_.map_block * blocks;
        for (int64_t block = 0; block < blocks; ++block) {
          packed[block * panel.lanes() + i] = row[block];
        }
      }
    }
    const float factor = 1.0f / static_cast<float>(a_.space * a_.heads / a_.map_heads);
    with_vectors(panel.vectors, [&](auto vectors) {
      add_block_cells<vectors>(a_.frames, a_.map_block, factor, packed, grads_);
    });
  }

  // Adds the gradient to Δ, strength * stat * dS.
  void add_delta_gradient(const Panel& panel) {
    for (int i = 0; i < panel.lanes(); ++i) panel.delta_weight[i] *= kLn2;
    const DeltaSums& sums = a_.delta_sums;
    with_vectors(panel.vectors, [&](auto vectors) {
      add_to_sums<vectors>(a_.frames, panel.delta_weight, grads_, sums.block_stride,
                           sums.key_stride,
                           sums.data + index_.head * sums.head_stride + panel.query_begin);
    });
  }

  // Adds the gradient to the statistic, and through it to the logit that it is.
  void add_stat_gradient(const Panel& panel, const MapMax& map_max, bool is_last) {
    with_vectors(panel.vectors, [&](auto vectors) {
      dot_delta<vectors>(weights_.delta(panel), a_.delta_key_stride, a_.frames, panel.query_count,
                         grads_, sums_);
    });
    for (int i = 0; i < panel.query_count; ++i) {
      // It passes where the statistic is the border itself, not where it is NaN.
      const bool passes = !a_.clamp_negative || panel.stat[i] >= 0.0f;
      const float grad = passes ? a_.strength * sums_[i] : 0.0f;
      switch (a_.stat) {
        case Stat::none: break;
        case Stat::row_max: cell_of_maximum(panel, i) += grad; break;
        case Stat::map_max: map_max_grad_ += grad; break;
        case Stat::tensor:
          grad_stat(panel.query_begin + i) = grad;
          break;
      }
    }
    if (a_.stat == Stat::map_max && is_last) {
      cell_of_maximum(panel, static_cast<int>(map_max.query - panel.query_begin)) += map_max_grad_;
    }
  }

  float& grad_stat(int64_t query) {
    return index_.in(a_.grad_stat, a_.grad_stat_strides)[query * a_.grad_stat_strides.frame];
  }

  float& cell_of_maximum(const Panel& panel, int i) {
    return grads_[static_cast<int64_t>(argmax_[i]) * panel.lanes() + i];
  }

  void add_values_gradient(const Panel& panel, const UnitRows<float>& grad_rows, bool is_first,
                           bool is_last) {
    static constexpr float kOne = 1.0f;
    add_over_queries(panel, panel.logits, grad_rows,
                     {index_.in(static_cast<T*>(a_.grad_value), a_.grad_value_strides),
                      a_.grad_value_strides.frame, value_sums_, plan_.padded_dim,
                      &kOne, 0, past_caches_, a_.frames, is_first, is_last});
  }

  void add_keys_gradient(const Panel& panel, bool is_first, bool is_last) {
    const T* queries =
        index_.in<T>(a_.query, a_.query_strides) + panel.query_begin * a_.query_strides.frame;
    const UnitRows<float> rows(queries, a_.query_strides.frame, panel.query_count, a_.head_dim,
                           scratch_ + plan_.query_rows);
    add_over_queries(panel, grads_, rows,
                     {index_.in(static_cast<T*>(a_.grad_key), a_.grad_key_strides),
                      a_.grad_key_strides.frame, key_sums_, plan_.padded_dim,
                      &a_.scale, 0, past_caches_, a_.frames, is_first, is_last});
  }

  void add_over_queries(const Panel& panel, const float* cells, const UnitRows<float>& x,
                        const ProductOut<T>& out) {
    product<Over::queries>(cells, panel.lanes(), x.data, x.stride, panel.query_count, a_.head_dim,
                           out, [this] { prefetcher_.step(); });
  }

  void write_query_gradient(const Panel& panel) {
    T* out = index_.in(static_cast<T*>(a_.grad_query), a_.grad_query_strides);
    const ProductOut<T> panel_out = {out + panel.query_begin * a_.grad_query_strides.frame,
                                     a_.grad_query_strides.frame,
                                     scratch_ + plan_.partial,
                                     plan_.padded_dim,
                                     &a_.scale,
                                     0,
                                     past_caches_};
    for (int64_t j = 0; j < a_.frames; j += kKeyBlock) {
      product_over_keys(panel, grads_, weights_.keys(), j, a_.frames, a_.head_dim, panel_out,
                        prefetcher_);
    }
  }

  const BackwardArgs& a_;
  const BackwardPlan& plan_;
  float* scratch_;
  int64_t part_;
  SequenceIndex index_;
  float *key_sums_, *value_sums_;
  AttentionWeights<T, float> weights_;
  UnitRows<float> values_;
  float* grads_;   // dP, then dS
  float* argmax_;  // keys, as floats
  float* sums_;
  bool past_caches_;
  float map_max_grad_ = 0.0f;
  Prefetcher prefetcher_;
};

template <typename T>
void backward_typed(const BackwardArgs& a, int64_t begin, int64_t end, float* scratch) {
  const BackwardPlan plan(a);
  for (int64_t item = begin; item < end; ++item) {
    SequenceBackward<T> sequence(a, plan, item, scratch);
    if (a.parts == 1 && item + 1 < end) sequence.fetch_ahead(item + 1);
    sequence.compute();
  }
  finish_stores();
}

template <typename T>
void backward_finish_typed(const BackwardArgs& a, int64_t sequence) {
  const BackwardPlan plan(a);
  const SequenceIndex index(a, sequence);
  const Strides &of_key = a.grad_key_strides, &of_value = a.grad_value_strides;
  T* grad_key = index.in(static_cast<T*>(a.grad_key), of_key);
  T* grad_value = index.in(static_cast<T*>(a.grad_value), of_value);
  float* sums = a.part_sums + sequence * a.parts * 2 * plan.sums_of_one;
  add_up_parts(sums, 2 * plan.sums_of_one, a.parts);
  for (int64_t j = 0; j < a.frames; ++j, sums += plan.padded_dim) {
    write_row(sums, a.scale, a.head_dim, grad_key + j * of_key.frame);
    write_row(sums + plan.sums_of_one, 1.0f, a.head_dim, grad_value + j * of_value.frame);
  }
}

inline void backward(const BackwardArgs& a, int64_t begin, int64_t end, float* scratch) {
  switch (a.type) {
    case ScalarType::float32: return backward_typed<float>(a, begin, end, scratch);
    case ScalarType::bfloat16: return backward_typed<bfloat16>(a, begin, end, scratch);
    case ScalarType::float16: return backward_typed<float16>(a, begin, end, scratch);
  }
}

inline void backward_finish(const BackwardArgs& a, int64_t sequence) {
  switch (a.type) {
    case ScalarType::float32: return backward_finish_typed<float>(a, sequence);
    case ScalarType::bfloat16: return backward_finish_typed<bfloat16>(a, sequence);
    case ScalarType::float16: return backward_finish_typed<float16>(a, sequence);
  }
}

inline int64_t backward_scratch(const BackwardArgs& a) { return BackwardPlan(a).size; }

inline int64_t backward_sums(const BackwardArgs& a) { return 2 * BackwardPlan(a).sums_of_one; }

}  // namespace vstar::VSTAR_ISA
