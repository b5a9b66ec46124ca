// Attention to a few keys and the maps of chosen columns of its weights, once for every instruction
// set.
//
// A block of queries goes over the heads. A head's keys and values are packed once for the block;
// then each panel's weights P are computed (columns_weights.h) and
//
//     out_i = sum_j P[j][i] v_j
//     sums[k][i] += sum_j P[j][i] G[j][k]      over the few keys that sparse columns weigh, or
//     sums[j][i] += P[j][i]                    of which dense columns make maps once, at the end
//
// and the maps are the sums' transpose, or their product with the columns, divided by the number of
// heads. Adding all weights up takes a tenth of the output's time, as sums of several panels lie in
// the second cache; a column that chooses a key takes next to nothing.
#pragma once

#include "columns_weights.h"

namespace vstar::VSTAR_ISA {

struct ColumnForwardPlan : ColumnPlan {
  int64_t sums;          // over heads, for each panel of the block
  int64_t panel_floats;  // of a panel's sums

  explicit ColumnForwardPlan(const ColumnArgs& a)
      : ColumnPlan(a),
        panel_floats((a.sparse.begin ? a.columns : padded_keys) * kPanelQueries) {
    sums = take(a.maps ? divide_up(a.queries_per_block, kPanelQueries) * panel_floats : 0);
  }
};

// Adds factor[i] * cells[j][i] to sums[j][i], which begin with it where it is the first.
template <int VECTORS>
VSTAR_STAGE void add_weights(int64_t keys, const float* factor, const float* cells, bool is_first,
                             float* sums) {
  Vec f[VECTORS];
  for (int c = 0; c < VECTORS; ++c) f[c] = load(factor + c * kLanes);
  for (int64_t j = 0; j < keys; ++j) {
    for (int c = 0; c < VECTORS; ++c, cells += kLanes, sums += kLanes) {
      const Vec weight = load(cells);
      store(sums, is_first ? mul(f[c], weight) : fma(f[c], weight, load(sums)));
    }
  }
}

// Adds factor[i] * sum_j cells[j][i] weight_jk to sums[k][i], over each column's entries; the sums
// begin with it where it is the first. `begin` is of the first column.
template <int VECTORS>
VSTAR_STAGE void add_sparse_columns(int64_t columns, const int64_t* begin,
                                    const ColumnEntry* entries, const float* factor,
                                    const float* cells, bool is_first, float* sums) {
  for (int64_t k = 0; k < columns; ++k) {
    Vec sum[VECTORS];
    for (int c = 0; c < VECTORS; ++c) sum[c] = zero();
    for (int64_t e = begin[k]; e < begin[k + 1]; ++e) {
      const float* row = cells + entries[e].key * VECTORS * kLanes;
      const Vec weight = broadcast(entries[e].weight);
      for (int c = 0; c < VECTORS; ++c) sum[c] = fma(weight, load(row + c * kLanes), sum[c]);
    }
    for (int c = 0; c < VECTORS; ++c, sums += kLanes) {
      const Vec f = load(factor + c * kLanes);
      store(sums, is_first ? mul(f, sum[c]) : fma(f, sum[c], load(sums)));
    }
  }
}

// Computes the output and the maps of one block of queries.
template <typename T, typename Unit>
class ColumnBlock {
 public:
  ColumnBlock(const ColumnArgs& args, int64_t item, float* scratch)
      : a_(args), plan_(args), scratch_(scratch) {
    const int64_t blocks = divide_up(args.queries, args.queries_per_block);
    batch_ = item / blocks;
    begin_ = item % blocks * args.queries_per_block;
    end_ = min64(begin_ + args.queries_per_block, args.queries);
  }

  void compute() const {
    for (int64_t h = 0; h < a_.heads; ++h) compute_head(h);
    if (a_.maps) write_maps();
  }

 private:
  void compute_head(int64_t h) const {
    const ColumnHead<T, Unit> head(a_, plan_, batch_, h, scratch_);
    const auto keys = head.template rows<Unit>(a_.key, a_.key_strides, scratch_ + plan_.keys);
    const float* values = nullptr;
    int64_t value_stride = 0;
    if (a_.value) {
      const auto rows =
          head.template rows<float>(a_.value, a_.value_strides, scratch_ + plan_.values);
      values = rows.data;
      value_stride = rows.stride;
    }
    for (int64_t first = begin_; first < end_; first += kPanelQueries) {
      const ColumnPanel panel(first, end_);
      Prefetcher prefetcher = fetch_after(h, first);
      head.compute_weights(keys, panel, prefetcher);
      if (a_.maps) add_to_sums_of(panel, head, h == 0);
      if (a_.value) {
        head.multiply_over_keys(panel, head.cells(), values, value_stride, a_.head_dim,
                                head.row(a_.out, a_.out_strides, first), a_.out_strides.frame,
                                head.inverse_sum(), 1, prefetcher);
      }
    }
  }

  void add_to_sums_of(const ColumnPanel& panel, const ColumnHead<T, Unit>& head,
                      bool is_first) const {
    with_vectors(panel.vectors(), [&](auto vectors) {
      if (a_.sparse.begin) {
        add_sparse_columns<vectors>(a_.columns, a_.sparse.begin + batch_ * a_.sparse.batch_stride,
                                    a_.sparse.entries, head.inverse_sum(), head.cells(), is_first,
                                    sums(panel));
      } else {
        add_weights<vectors>(a_.keys, head.inverse_sum(), head.cells(), is_first, sums(panel));
      }
    });
  }

  // Returns what fetches the rows of the panel that comes next while the present one is computed.
  Prefetcher fetch_after(int64_t h, int64_t first) const {
    first += kPanelQueries;
    if (first >= end_) {
      first = begin_;
      if (++h == a_.heads) return {};
    }
    const ColumnHead<T, Unit> head(a_, plan_, batch_, h, scratch_);
    const ColumnPanel panel(first, end_);
    // Without an output there is only the query to fetch, again.
    const RowStream query = head.stream(a_.query, a_.query_strides, panel);
    const RowStream streams[] = {
        query, a_.value ? head.stream(a_.out, a_.out_strides, panel) : query};
    return {streams, panel.count, a_.head_dim * static_cast<int64_t>(sizeof(T)),
            divide_up(a_.keys, kLogitsKeys) +
                (a_.value ? product_tiles(panel.count, a_.head_dim) : 0)};
  }

  float* sums(const ColumnPanel& panel) const {
    return scratch_ + plan_.sums + (panel.begin - begin_) / kPanelQueries * plan_.panel_floats;
  }

  void write_maps() const {
    const float factor = 1.0f / static_cast<float>(a_.heads);
    for (int64_t first = begin_; first < end_; first += kPanelQueries) {
      const ColumnPanel panel(first, end_);
      float* maps = a_.maps + (batch_ * a_.queries + first) * a_.columns;
      if (a_.sparse.begin) {
        const float* sums_of = sums(panel);
        for (int i = 0; i < panel.count; ++i) {
          for (int64_t k = 0; k < a_.columns; ++k) {
            *maps++ = factor * sums_of[k * panel.lanes() + i];
          }
        }
        continue;
      }
      Prefetcher nothing;
      const ColumnHead<T, Unit> head(a_, plan_, batch_, 0, scratch_);
      const float* columns = a_.column_weights + batch_ * a_.column_weights_stride;
      head.multiply_over_keys(panel, sums(panel), columns, a_.columns, a_.columns, maps,
                              a_.columns, &factor, 0, nothing);
    }
  }

  const ColumnArgs& a_;
  const ColumnForwardPlan plan_;
  float* scratch_;
  int64_t batch_, begin_, end_;
};

template <typename T, typename Unit>
void columns_forward_typed(Types<T, Unit>, const ColumnArgs& a, int64_t item, float* scratch) {
  ColumnBlock<T, Unit>(a, item, scratch).compute();
}

inline int64_t columns_scratch(const ColumnArgs& a) { return ColumnForwardPlan(a).size; }

inline void columns_forward(const ColumnArgs& a, int64_t item, float* scratch) {
  with_types(a.type, a.head_dim, [&](auto types) { columns_forward_typed(types, a, item, scratch); });
}

}  // namespace vstar::VSTAR_ISA
