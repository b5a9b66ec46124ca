// The weights of column_attention, panel by panel: what both directions compute.
//
// As in attention_weights.h a whole row of logits is there before its exponentials, with the queries
// along the lanes and one row of cells for each key, but the number of keys, a text's tokens, is not
// that of the queries. References are raised by the headroom log2(number of keys), so that no sum of
// finite values, with weights, overflows.
#pragma once

#include "columns.h"
#include "microkernels.h"
#include "packing.h"
#include "panel.h"
#include "prefetch.h"

namespace vstar::VSTAR_ISA {

// Up to two vectors of the queries of a batch element and head, along the lanes.
struct ColumnPanel {
  int64_t begin;
  int count;

  ColumnPanel(int64_t begin, int64_t end)
      : begin(begin), count(static_cast<int>(min64(end - begin, kPanelQueries))) {}

  int vectors() const { return count > kLanes ? 2 : 1; }
  int lanes() const { return vectors() * kLanes; }
};

// Where each array of a thread's scratch begins (in floats): those that both directions have.
struct ColumnPlan {
  int64_t padded_dim, padded_keys;  // the latter in whole tiles of products over queries
  int64_t keys, values;             // of one batch element and head
  int64_t queries;                  // packed
  int64_t cells;
  int64_t row_max, inverse_sum;  // one float for each lane
  int64_t partial;
  int64_t size = 0;

  explicit ColumnPlan(const ColumnArgs& a)
      : padded_dim(round_up(a.head_dim, kLanes)), padded_keys(round_up(a.keys, kProductRows)) {
    keys = take(a.keys * padded_dim);
    values = take(a.keys * padded_dim);
    queries = take(padded_dim * kPanelQueries);
    cells = take(padded_keys * kPanelQueries);
    row_max = take(kPanelQueries);
    inverse_sum = take(kPanelQueries);
    partial = take(kPanelQueries * round_up(a.head_dim > a.columns ? a.head_dim : a.columns, kLanes));
  }

  // Returns where an array of this many floats begins.
  int64_t take(int64_t floats) {
    const int64_t start = size;
    size += round_up(floats, 16);  // a cache line
    return start;
  }
};

// The rows of one batch element and head, whose tensors hold T; QK' is computed in Units.
template <typename T, typename Unit>
class ColumnHead {
 public:
  using Source = UnitSource<T, Unit>;

  ColumnHead(const ColumnArgs& args, const ColumnPlan& plan, int64_t batch, int64_t head,
             float* scratch)
      : a_(args), plan_(plan), batch_(batch), head_(head), scratch_(scratch) {}

  int64_t batch() const { return batch_; }
  int64_t units() const { return a_.head_dim / Source::kElements; }
  float* cells() const { return scratch_ + plan_.cells; }
  float* inverse_sum() const { return scratch_ + plan_.inverse_sum; }
  float* partial() const { return scratch_ + plan_.partial; }

  template <typename Element>
  Element* row(Element* tensor, const Strides& s, int64_t token) const {
    return tensor + batch_ * s.batch + head_ * s.head + token * s.frame;
  }
  const T* row(const void* tensor, const Strides& s, int64_t token) const {
    return row(static_cast<const T*>(tensor), s, token);
  }
  T* row(void* tensor, const Strides& s, int64_t token) const {
    return row(static_cast<T*>(tensor), s, token);
  }

  // Returns all keys' rows of a tensor in units, for which `scratch` has room.
  template <typename AsUnit>
  UnitRows<AsUnit> rows(const void* tensor, const Strides& s, float* scratch) const {
    return {row(tensor, s, 0), s.frame, a_.keys, a_.head_dim, scratch};
  }
  // Returns a panel's rows of a tensor, laid out as the queries for products with rows.
  void pack(const void* tensor, const Strides& s, const ColumnPanel& panel, float* packed) const {
    pack_queries<typename Source::Type>(row(tensor, s, panel.begin), s.frame, panel.count,
                                        panel.lanes(), units(), packed);
  }
  // Returns what is to be fetched of a tensor for a panel.
  RowStream stream(const void* tensor, const Strides& s, const ColumnPanel& panel) const {
    return {row(tensor, s, panel.begin), s.frame * static_cast<int64_t>(sizeof(T))};
  }

  // Sets the cells to a panel's weights, up to one over their sum, which goes to inverse_sum.
  void compute_weights(const UnitRows<Unit>& keys, const ColumnPanel& panel,
                       Prefetcher& prefetcher) const {
    float* queries = scratch_ + plan_.queries;
    float* row_max = scratch_ + plan_.row_max;
    pack(a_.query, a_.query_strides, panel, queries);
    for (int i = 0; i < panel.lanes(); ++i) row_max[i] = -kInfinity;
    with_vectors(panel.vectors(), [&](auto vectors) {
      for (int64_t j = 0; j < a_.keys; j += kLogitsKeys) {
        prefetcher.step();
        logits_of_keys<vectors>(keys.from(j), keys.stride,
                                static_cast<int>(min64(kLogitsKeys, a_.keys - j)), queries,
                                units(), a_.scale * kLog2E, cells() + j * panel.lanes(), row_max);
      }
      const float headroom = log2_of_keys();
      for (int i = 0; i < panel.lanes(); ++i) row_max[i] += headroom;
      exponentiate<vectors>(a_.keys, row_max, cells(), inverse_sum());
      invert<vectors>(inverse_sum());
    });
  }

  // Computes a product over the keys: out_i = scale[i * scale_stride] * sum_j cells[j][i] x_j for
  // the panel's queries i, x_j rows of `dim`.
  template <typename Element>
  void multiply_over_keys(const ColumnPanel& panel, const float* weights, const float* x,
                          int64_t x_stride, int64_t dim, Element* out, int64_t out_stride,
                          const float* scale, int64_t scale_stride, Prefetcher& prefetcher) const {
    ProductOut<Element> to = {out,   out_stride,   partial(), round_up(dim, kLanes),
                              scale, scale_stride, false,     panel.count};
    for (int64_t j = 0; j < a_.keys; j += kKeyBlock) {
      const int64_t keys = min64(kKeyBlock, a_.keys - j);
      to.is_first_block = j == 0;
      to.is_last_block = j + keys == a_.keys;
      product<Over::keys>(weights + j * panel.lanes(), panel.lanes(), x + j * x_stride, x_stride,
                          keys, dim, to, [&prefetcher] { prefetcher.step(); });
    }
  }

 private:
  float log2_of_keys() const {
    float result = 0.0f;
    for (int64_t n = 1; n < a_.keys; n *= 2) result += 1.0f;
    return result;
  }

  const ColumnArgs& a_;
  const ColumnPlan& plan_;
  int64_t batch_, head_;
  float* scratch_;
};

}  // namespace vstar::VSTAR_ISA
