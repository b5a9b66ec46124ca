// The gradients of temporal attention regularization, once for every instruction set.
//
// Nothing is kept from the forward: a thread takes whole sequences, panel by panel, and computes a
// panel's weights again (weights.h). With P the normalised weights, G the gradient to the mean map,
// and the panel's queries along the lanes:
//
//     dP[j][i] = v_j . do_i + G_ij / (space * heads)       values broadcast against packed rows
//     dS[j][i] = P[j][i] * (dP[j][i] - sum_k P dP)         the gradient to the regularized logits
//     dS[argmax_i][i] += strength * sum_k dS[k][i] bias    through m_i = max_j logits[j][i]
//     dv_j += sum_i P[j][i] do_i                           products over the panel's queries,
//     dk_j += scale * sum_i dS[j][i] q_i                   kept for all keys between panels
//     dq_i  = scale * sum_j dS[j][i] k_j                   a product over keys, as in the forward
//
// which is five products of the forward's size. A map_max takes the sum over all queries at the
// map's single maximum, whose panel therefore comes last. A sequence's bits depend on nothing but
// its own numbers.
#pragma once

#include "gradients.h"
#include "weights.h"

namespace vstar::VSTAR_ISA {

struct BackwardPlan : PanelPlan {
  int64_t grads, packed_grads, grad_map;  // as a panel's logits; as its queries; as its logits
  int64_t query_rows, grad_rows;          // a panel's, where they cannot be used in place
  int64_t partial, key_sums, value_sums;
  int64_t first_maxima, sums;  // of a panel's queries

  explicit BackwardPlan(const BackwardArgs& a) : PanelPlan(a, 1) {
    grads = take(padded_keys * kMaxPanelRows);
    packed_grads = take(a.head_dim * kMaxPanelRows);
    grad_map = take(a.grad_map ? a.frames * kMaxPanelRows : 0);
    query_rows = take(a.head_dim * kMaxPanelRows);
    grad_rows = take(a.head_dim * kMaxPanelRows);
    partial = take(padded_dim * kMaxPanelRows);
    key_sums = take(padded_dim * padded_keys);
    value_sums = take(padded_dim * padded_keys);
    first_maxima = take(kMaxPanelRows);
    sums = take(kMaxPanelRows);
  }
};

// The sequence of T whose gradients are computed.
template <typename T>
class SequenceGradient {
 public:
  SequenceGradient(const BackwardArgs& args, const BackwardPlan& plan, int64_t index,
                   float* scratch)
      : a_(args),
        plan_(plan),
        scratch_(scratch),
        place_(args, index),
        weights_(args, plan, place_, scratch),
        values_(place_.in<T>(args.value, args.value_strides), args.value_strides.frame, args.frames,
                args.head_dim, scratch + plan.values),
        grads_(scratch + plan.grads),
        first_max_(scratch + plan.first_maxima),
        sums_(scratch + plan.sums) {}

  void fetch_ahead(int64_t index) {
    const int64_t row_bytes = a_.head_dim * static_cast<int64_t>(sizeof(T));
    if (a_.frames * row_bytes > kPrefetchBytes) return;
    const Place next(a_, index);
    const RowStream streams[] = {next.stream<T>(a_.query, a_.query_strides),
                                 next.stream<T>(a_.key, a_.key_strides),
                                 next.stream<T>(a_.value, a_.value_strides),
                                 next.stream<T>(a_.grad_out, a_.grad_out_strides),
                                 next.stream<T>(a_.grad_query, a_.grad_query_strides),
                                 next.stream<T>(a_.grad_key, a_.grad_key_strides),
                                 next.stream<T>(a_.grad_value, a_.grad_value_strides)};
    const int64_t panels = (a_.frames + kMaxPanelRows - 1) / kMaxPanelRows;
    const int64_t logits_steps = 2 * ((a_.frames + kKeyRows - 1) / kKeyRows);
    ahead_ = Prefetcher(streams, a_.frames, row_bytes,
                        panels * (logits_steps + 3 * column_tiles(a_.head_dim)));
  }

  void compute() {
    const MapMax map_max = weights_.map_max(ahead_);
    const int64_t panels = (a_.frames + kMaxPanelRows - 1) / kMaxPanelRows;
    // Only the panel with the map's maximum needs to know what the others add to its gradient.
    const bool to_one_cell = through_stat() && a_.stat == Stat::map_max;
    const int64_t last = to_one_cell ? map_max.row / kMaxPanelRows : panels - 1;
    int64_t done = 0;
    for (int64_t p = 0; p < panels; ++p) {
      if (p != last) compute_panel(p, map_max, done++ == 0, false);
    }
    compute_panel(last, map_max, done == 0, true);
  }

 private:
  void compute_panel(int64_t index, const MapMax& map_max, bool first, bool last) {
    const int64_t row = index * kMaxPanelRows;
    const Panel panel = plan_.panel(a_, scratch_, 0, row, a_.frames - row);
    weights_.compute_logits(&panel, 1, ahead_);
    if (through_stat() && (a_.stat == Stat::row_max || (a_.stat == Stat::map_max && last))) {
      const auto find = panel.vectors == 1 ? first_maxima<1> : first_maxima<2>;
      find(a_.frames, panel.logits, panel.row_max, first_max_);
    }
    weights_.exponentiate_logits(panel, map_max);

    const Rows<float> grad_rows = rows_of_grad_out(panel);
    multiply_values(panel, grad_rows);
    if (a_.grad_map) add_map_gradient(panel);
    const auto differentiate = panel.vectors == 1 ? softmax_gradient<1> : softmax_gradient<2>;
    differentiate(a_.frames, panel.inverse_sum, panel.logits, grads_, sums_);
    add_values_gradient(panel, grad_rows, first, last);
    if (a_.bias_sums.data) add_bias_gradient(panel);
    if (through_stat()) add_stat_gradient(panel, map_max, last);
    add_keys_gradient(panel, first, last);
    write_query_gradient(panel);
  }

  bool through_stat() const {
    return a_.bias && !a_.detach_stat && (a_.stat != Stat::tensor || a_.grad_stat) &&
           a_.stat != Stat::none;
  }

  Rows<float> rows_of_grad_out(const Panel& panel) const {
    const T* rows = place_.in<T>(a_.grad_out, a_.grad_out_strides) +
                    panel.row * a_.grad_out_strides.frame;
    float* packed = scratch_ + plan_.grad_rows;
    if (a_.grad_out_dim_stride == 1) {
      return Rows<float>(rows, a_.grad_out_strides.frame, panel.count, a_.head_dim, packed);
    }
    gather_rows(rows, a_.grad_out_strides.frame, a_.grad_out_dim_stride, panel.count, a_.head_dim,
                packed);
    return Rows<float>(packed, a_.head_dim, panel.count, a_.head_dim, packed);
  }

  // grads = do v', the gradient to the weights.
  void multiply_values(const Panel& panel, const Rows<float>& grad_rows) {
    float* packed = scratch_ + plan_.packed_grads;
    pack_queries<float>(grad_rows.data, grad_rows.stride, panel.count, panel.lanes(), a_.head_dim,
                        packed);
    const auto multiply = panel.vectors == 1 ? logits_rows<1, float> : logits_rows<2, float>;
    for (int64_t j = 0; j < a_.frames; j += kKeyRows) {
      const int rows = static_cast<int>(min64(kKeyRows, a_.frames - j));
      ahead_.step();
      // The maxima are of no use here.
      multiply(values_.from(j), values_.stride, rows, packed, a_.head_dim, 1.0f,
               grads_ + j * panel.lanes(), sums_);
    }
  }

  void add_map_gradient(const Panel& panel) {
    float* packed = scratch_ + plan_.grad_map;
    const float* rows = a_.grad_map + (place_.batch * a_.frames + panel.row) * a_.frames;
    pack_queries<float>(rows, a_.frames, panel.count, panel.lanes(), a_.frames, packed);
    const auto add = panel.vectors == 1 ? add_cells<1> : add_cells<2>;
    add(a_.frames, 1.0f / static_cast<float>(a_.space * a_.heads), packed, grads_);
  }

  // To the bias: strength * stat * dS.
  void add_bias_gradient(const Panel& panel) {
    for (int i = 0; i < panel.lanes(); ++i) panel.weight[i] *= kLn2;
    const BiasSums& sums = a_.bias_sums;
    const auto add = panel.vectors == 1 ? add_to_sums<1> : add_to_sums<2>;
    add(a_.frames, panel.weight, grads_, sums.block_stride, sums.key_stride,
        sums.data + place_.head * sums.head_stride + panel.row);
  }

  // To the statistic, and through it to the logit that it is.
  void add_stat_gradient(const Panel& panel, const MapMax& map_max, bool last) {
    const auto sum = panel.vectors == 1 ? sum_bias<1> : sum_bias<2>;
    sum(weights_.bias(panel), a_.bias_key_stride, a_.frames, panel.count, grads_, sums_);
    for (int i = 0; i < panel.count; ++i) {
      // As torch.clamp: it passes where the statistic is the border itself, not where it is NaN.
      const bool passes = !a_.clamp_negative || panel.stat[i] >= 0.0f;
      const float grad = passes ? a_.strength * sums_[i] : 0.0f;
      switch (a_.stat) {
        case Stat::none: break;
        case Stat::row_max: cell_of_maximum(panel, i) += grad; break;
        case Stat::map_max: map_max_grad_ += grad; break;
        case Stat::tensor:
          place_.in(a_.grad_stat,
                    a_.grad_stat_strides)[(panel.row + i) * a_.grad_stat_strides.frame] = grad;
          break;
      }
    }
    if (a_.stat == Stat::map_max && last) {
      cell_of_maximum(panel, static_cast<int>(map_max.row - panel.row)) += map_max_grad_;
    }
  }

  float& cell_of_maximum(const Panel& panel, int i) {
    return grads_[static_cast<int64_t>(first_max_[i]) * panel.lanes() + i];
  }

  void add_values_gradient(const Panel& panel, const Rows<float>& grad_rows, bool first,
                           bool last) {
    static constexpr float kOne = 1.0f;
    add_over_queries(panel, panel.logits, grad_rows,
                     {place_.in(static_cast<T*>(a_.grad_value), a_.grad_value_strides),
                      a_.grad_value_strides.frame, scratch_ + plan_.value_sums, plan_.padded_dim,
                      &kOne, 0, a_.frames, first, last});
  }

  void add_keys_gradient(const Panel& panel, bool first, bool last) {
    const T* queries =
        place_.in<T>(a_.query, a_.query_strides) + panel.row * a_.query_strides.frame;
    const Rows<float> rows(queries, a_.query_strides.frame, panel.count, a_.head_dim,
                           scratch_ + plan_.query_rows);
    add_over_queries(panel, grads_, rows,
                     {place_.in(static_cast<T*>(a_.grad_key), a_.grad_key_strides),
                      a_.grad_key_strides.frame, scratch_ + plan_.key_sums, plan_.padded_dim,
                      &a_.scale, 0, a_.frames, first, last});
  }

  void add_over_queries(const Panel& panel, const float* cells, const Rows<float>& x,
                        const Target<T>& target) {
    product<Over::queries>(cells, panel.lanes(), x.data, x.stride, panel.count, a_.head_dim, target,
                           [this] { ahead_.step(); });
  }

  void write_query_gradient(const Panel& panel) {
    T* out = place_.in(static_cast<T*>(a_.grad_query), a_.grad_query_strides);
    const Target<T> target = {out + panel.row * a_.grad_query_strides.frame,
                              a_.grad_query_strides.frame,
                              scratch_ + plan_.partial,
                              plan_.padded_dim,
                              &a_.scale,
                              0};
    for (int64_t j = 0; j < a_.frames; j += kKeyBlock) {
      product_over_keys(panel, grads_, weights_.keys(), j, a_.frames, a_.head_dim, target,
                        ahead_);
    }
  }

  const BackwardArgs& a_;
  const BackwardPlan& plan_;
  float* scratch_;
  Place place_;
  Weights<T, float> weights_;
  Rows<float> values_;
  float* grads_;      // dP, then dS
  float* first_max_;  // keys, as floats
  float* sums_;
  float map_max_grad_ = 0.0f;
  Prefetcher ahead_;
};

template <typename T>
void backward_typed(const BackwardArgs& a, int64_t first, int64_t last, float* scratch) {
  const BackwardPlan plan(a);
  for (int64_t index = first; index < last; ++index) {
    SequenceGradient<T> gradient(a, plan, index, scratch);
    if (index + 1 < last) gradient.fetch_ahead(index + 1);
    gradient.compute();
  }
}

inline void backward(const BackwardArgs& a, int64_t first, int64_t last, float* scratch) {
  switch (a.type) {
    case ScalarType::float32: return backward_typed<float>(a, first, last, scratch);
    case ScalarType::bfloat16: return backward_typed<bfloat16>(a, first, last, scratch);
    case ScalarType::float16: return backward_typed<float16>(a, first, last, scratch);
  }
}

inline int64_t backward_scratch(const BackwardArgs& a) { return BackwardPlan(a).size; }

}  // namespace vstar::VSTAR_ISA
