// The gradients of column_attention, once for every instruction set.
//
// As in backward.h nothing is kept from the forward: a panel's weights P are computed again. With dM
// the gradient to the maps, whose columns G are the same for all heads:
//
//     dP[j][i] = v_j . do_i + g_j . dm_i / heads       one product, over head_dim and the columns
//     dS[j][i] = P[j][i] * (dP[j][i] - sum_k P dP)
//     dq_i = scale * sum_j dS[j][i] k_j                a product over keys, as in the forward
//     dv_j += sum_i P[j][i] do_i                       products over the panel's queries
//     dk_j += scale * sum_i dS[j][i] q_i
//
// and each only where it is wanted: with dq alone, three products of the forward's size. An item is
// a part of the queries of a head; parts' sums of dk and dv are added up in their order when all are
// done.
#pragma once

#include "columns_weights.h"
#include "gradients.h"

namespace vstar::VSTAR_ISA {

struct ColumnBackwardPlan : ColumnPlan {
  int64_t key_rows;               // in float32, for dq
  int64_t grads;                  // cells
  int64_t grad_outs, grad_maps;   // packed
  int64_t query_rows, grad_rows;  // a panel's, where they cannot be used in place
  int64_t dots;                   // one float for each lane

  explicit ColumnBackwardPlan(const ColumnBackwardArgs& a) : ColumnPlan(a) {
    key_rows = take(a.keys * padded_dim);
    grads = take(padded_keys * kPanelQueries);
    grad_outs = take(padded_dim * kPanelQueries);
    grad_maps = take(a.columns * kPanelQueries);
    query_rows = take(a.grad_key ? padded_dim * kPanelQueries : 0);
    grad_rows = take(a.grad_value ? padded_dim * kPanelQueries : 0);
    dots = take(kPanelQueries);
  }
};

// Rows that a panel's packed rows are multiplied by: units of each row, both `lanes` apart where
// they are packed.
template <typename Unit>
struct Factor {
  const Unit* rows;
  int64_t stride;
  const float* packed;
  int64_t units;
};

// Computes, for KEYS keys and a panel of VECTORS vectors of queries, the sum of two products.
template <int KEYS, int VECTORS, typename Unit>
inline void two_products_tile(const Factor<Unit>& a, const Factor<float>& b, float* cells) {
  constexpr int lanes = VECTORS * kLanes;
  Vec sum[KEYS][VECTORS];
  unrolled<KEYS, VECTORS>([&](auto k, auto c) VSTAR_INLINE { sum[k][c] = zero(); });
  const auto add_product = [&](const auto& factor) VSTAR_INLINE {
    for (int64_t d = 0; d < factor.units; ++d) {
      Vec x[VECTORS];
      unrolled<VECTORS>(
          [&](auto c) VSTAR_INLINE { x[c] = load(factor.packed + d * lanes + c * kLanes); });
      unrolled<KEYS>([&](auto k) VSTAR_INLINE {
        const Vec row = broadcast(factor.rows + k * factor.stride + d);
        unrolled<VECTORS>([&](auto c) VSTAR_INLINE {
          sum[k][c] = multiply_add(factor.rows, row, x[c], sum[k][c]);
        });
      });
    }
  };
  add_product(a);
  add_product(b);
  unrolled<KEYS, VECTORS>([&](auto k, auto c) VSTAR_INLINE {
    store(cells + k * lanes + c * kLanes, sum[k][c]);
  });
}

// Does as two_products_tile for `count` keys, at most KEYS.
template <int VECTORS, int KEYS = kLogitsKeys, typename Unit>
void two_products(int count, const Factor<Unit>& a, const Factor<float>& b, float* cells) {
  if constexpr (KEYS > 0) {
    if (count == KEYS) {
      two_products_tile<KEYS, VECTORS>(a, b, cells);
    } else {
      two_products<VECTORS, KEYS - 1>(count, a, b, cells);
    }
  }
}

// Computes the gradients of one item.
template <typename T, typename Unit>
class ColumnGradients {
 public:
  ColumnGradients(const ColumnBackwardArgs& args, int64_t item, float* scratch)
      : a_(args),
        plan_(args),
        scratch_(scratch),
        part_(item % args.parts),
        head_(args, plan_, item / args.parts / args.heads, item / args.parts % args.heads, scratch),
        key_sums_(args.sums ? args.sums + item * sums_floats() : nullptr),
        value_sums_(args.sums ? key_sums_ + sums_floats() / 2 : nullptr) {}

  void compute() const {
    if (has_sums()) {
      for (int64_t i = 0; i < sums_floats(); i += kLanes) store(key_sums_ + i, zero());
    }
    const auto keys = head_.template rows<Unit>(a_.key, a_.key_strides, scratch_ + plan_.keys);
    Factor<Unit> values = {};
    if (a_.grad_out) {
      const auto rows =
          head_.template rows<Unit>(a_.value, a_.value_strides, scratch_ + plan_.values);
      values = {rows.data, rows.stride, scratch_ + plan_.grad_outs, head_.units()};
    }
    const UnitRows<float> key_rows = in_floats(keys);
    const int64_t panels = divide_up(a_.queries, kPanelQueries);
    const int64_t end = (part_ + 1) * panels / a_.parts;
    for (int64_t p = part_ * panels / a_.parts; p < end; ++p) {
      const ColumnPanel panel(p * kPanelQueries, a_.queries);
      Prefetcher prefetcher;
      if (p + 1 < end) prefetcher = fetch(ColumnPanel((p + 1) * kPanelQueries, a_.queries));
      head_.compute_weights(keys, panel, prefetcher);
      compute_gradients_to_logits(panel, values, prefetcher);
      add_products(panel, key_rows, prefetcher);
    }
  }

  // Adds the sums of the item's later parts to this one, the first, and writes dk and dv.
  void finish() const {
    add_up_parts(key_sums_, sums_floats(), a_.parts);
    for (int64_t j = 0; j < a_.keys; ++j) {
      const int64_t at = j * plan_.padded_dim;
      if (a_.grad_key) {
        write_row(key_sums_ + at, a_.scale, a_.head_dim,
                  head_.row(a_.grad_key, a_.grad_key_strides, j));
      }
      if (a_.grad_value) {
        write_row(value_sums_ + at, 1.0f, a_.head_dim,
                  head_.row(a_.grad_value, a_.grad_value_strides, j));
      }
    }
  }

 private:
  bool has_sums() const { return a_.grad_key || a_.grad_value; }
  int64_t sums_floats() const { return 2 * a_.keys * plan_.padded_dim; }
  float* grads() const { return scratch_ + plan_.grads; }

  // Returns the keys' rows in float32.
  UnitRows<float> in_floats(const UnitRows<float>& keys) const { return keys; }
  template <typename Other>
  UnitRows<float> in_floats(const UnitRows<Other>&) const {
    return head_.template rows<float>(a_.key, a_.key_strides, scratch_ + plan_.key_rows);
  }

  // Returns what fetches the rows of a panel while the one before it is computed.
  Prefetcher fetch(const ColumnPanel& panel) const {
    const RowStream query = head_.stream(a_.query, a_.query_strides, panel);
    // What there is not is the query, again.
    const RowStream streams[] = {
        query, a_.grad_out ? head_.stream(a_.grad_out, a_.grad_out_strides, panel) : query,
        a_.grad_query ? head_.stream(a_.grad_query, a_.grad_query_strides, panel) : query};
    return {streams, panel.count, a_.head_dim * static_cast<int64_t>(sizeof(T)),
            2 * divide_up(a_.keys, kLogitsKeys) + product_tiles(panel.count, a_.head_dim)};
  }

  // Sets the cells to normalised weights, and their gradients to those to the logits.
  void compute_gradients_to_logits(const ColumnPanel& panel, Factor<Unit> values,
                                   Prefetcher& prefetcher) const {
    if (a_.grad_out) {
      head_.pack(a_.grad_out, a_.grad_out_strides, panel, scratch_ + plan_.grad_outs);
    }
    Factor<float> columns = {};
    if (a_.grad_maps) columns = pack_grad_maps(panel);
    const int lanes = panel.lanes();
    with_vectors(panel.vectors(), [&](auto vectors) {
      for (int64_t j = 0; j < a_.keys; j += kLogitsKeys) {
        prefetcher.step();
        two_products<vectors>(static_cast<int>(min64(kLogitsKeys, a_.keys - j)), values, columns,
                              grads() + j * lanes);
        values.rows += kLogitsKeys * values.stride;
        columns.rows += kLogitsKeys * columns.stride;
      }
      softmax_gradient<vectors>(a_.keys, head_.inverse_sum(), head_.cells(), grads(),
                                scratch_ + plan_.dots);
    });
  }

  // Packs the gradients to a panel's maps, divided by the heads, of which these are the mean.
  Factor<float> pack_grad_maps(const ColumnPanel& panel) const {
    float* packed = scratch_ + plan_.grad_maps;
    pack_queries<float>(a_.grad_maps + (head_.batch() * a_.queries + panel.begin) * a_.columns,
                        a_.columns, panel.count, panel.lanes(), a_.columns, packed);
    const Vec factor = broadcast(1.0f / static_cast<float>(a_.heads));
    for (int64_t i = 0; i < a_.columns * panel.lanes(); i += kLanes) {
      store(packed + i, mul(factor, load(packed + i)));
    }
    return {a_.column_weights + head_.batch() * a_.column_weights_stride, a_.columns, packed,
            a_.columns};
  }

  // Computes what a panel's gradients add to dq, dk and dv.
  void add_products(const ColumnPanel& panel, const UnitRows<float>& key_rows,
                    Prefetcher& prefetcher) const {
    if (a_.grad_query) {
      head_.multiply_over_keys(panel, grads(), key_rows.data, key_rows.stride, a_.head_dim,
                               head_.row(a_.grad_query, a_.grad_query_strides, panel.begin),
                               a_.grad_query_strides.frame, &a_.scale, 0, prefetcher);
    }
    if (a_.grad_key) {
      add_over_queries(panel, grads(), a_.query, a_.query_strides, plan_.query_rows, key_sums_);
    }
    if (a_.grad_value) {
      add_over_queries(panel, head_.cells(), a_.grad_out, a_.grad_out_strides, plan_.grad_rows,
                       value_sums_);
    }
  }

  // Adds the product of cells and a panel's rows of a tensor to sums.
  void add_over_queries(const ColumnPanel& panel, const float* cells, const void* tensor,
                        const Strides& s, int64_t packed, float* sums) const {
    const UnitRows<float> rows(head_.row(tensor, s, panel.begin), s.frame, panel.count,
                               a_.head_dim, scratch_ + packed);
    product<Over::queries>(cells, panel.lanes(), rows.data, rows.stride, panel.count, a_.head_dim,
                           RowSums{sums, plan_.padded_dim, a_.keys}, [] {});
  }

  const ColumnBackwardArgs& a_;
  const ColumnBackwardPlan plan_;
  float* scratch_;
  int64_t part_;
  ColumnHead<T, Unit> head_;
  float *key_sums_, *value_sums_;
};

inline int64_t columns_backward_scratch(const ColumnBackwardArgs& a) {
  return ColumnBackwardPlan(a).size;
}

template <typename T, typename Unit>
void columns_backward_typed(Types<T, Unit>, const ColumnBackwardArgs& a, int64_t item,
                            float* scratch) {
  ColumnGradients<T, Unit>(a, item, scratch).compute();
}

inline void columns_backward(const ColumnBackwardArgs& a, int64_t item, float* scratch) {
  with_types(a.type, a.head_dim,
             [&](auto types) { columns_backward_typed(types, a, item, scratch); });
}

template <typename T, typename Unit>
void columns_finish_typed(Types<T, Unit>, const ColumnBackwardArgs& a, int64_t sequence) {
  ColumnGradients<T, Unit>(a, sequence * a.parts, nullptr).finish();
}

inline void columns_backward_finish(const ColumnBackwardArgs& a, int64_t sequence) {
  with_types(a.type, a.head_dim, [&](auto types) { columns_finish_typed(types, a, sequence); });
}

}  // namespace vstar::VSTAR_ISA
