// The attention weights of a sequence, which both directions compute first, panel by panel.
//
// With the queries along the lanes and one row of cells for each key:
//
//     logits[j][i] = (scale * log2 e) q_i . k_j         keys broadcast against packed queries
//     m_i  = max_j logits[j][i]                         exact: the whole row is there
//     logits[j][i] += strength * stat_i * delta(j, i)   a shifted row of the Toeplitz table
//     logits[j][i]  = 2^(logits[j][i] - max_j)          the weights, up to one over their sum
//
// so no step needs a sum or a maximum across lanes, and neither K nor V is transposed. The order of
// the operations on one query depends on nothing but N and head_dim: not on its neighbours, its
// panel, or the number of threads.
#pragma once

#include "microkernels.h"
#include "packing.h"
#include "panel.h"
#include "prefetch.h"

namespace vstar::VSTAR_ISA {

// Which (batch, space, head) a sequence is.
struct SequenceIndex {
  int64_t batch, space, head;

  SequenceIndex(const Problem& p, int64_t sequence)
      : batch(sequence / p.heads / p.space),
        space(sequence / p.heads % p.space),
        head(sequence % p.heads) {}

  // Returns where the sequence begins in a tensor.
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

// The largest logit of a map and its query, the first if there are several.
struct MapMax {
  float value = -kInfinity;  // times log2 e
  int64_t query = 0;
};

// Returns how often compute_logits() calls a prefetcher for all of a sequence's panels, where they
// are there one by one.
inline int64_t logits_steps(int64_t frames) {
  const int64_t whole = frames / kPanelQueries, rest = frames % kPanelQueries;
  const auto of_panel = [frames](int64_t keys) { return 1 + divide_up(frames, keys); };
  return whole * of_panel(kLogitsKeys) +
         (rest == 0 ? 0 : of_panel(rest > kLanes ? kLogitsKeys : kMaxVectors * kLogitsKeys));
}

// Computes a sequence's attention weights. Its tensors hold T; QK' is computed in Units.
template <typename T, typename Unit>
class AttentionWeights {
 public:
  AttentionWeights(const Problem& problem, const PanelPlan& plan, const SequenceIndex& index,
                   float* scratch)
      : p_(problem),
        plan_(plan),
        index_(index),
        scratch_(scratch),
        query_(index.in<T>(problem.query, problem.query_strides)),
        keys_(index.in<T>(problem.key, problem.key_strides), problem.key_strides.frame,
              problem.frames, problem.head_dim, scratch + plan.keys, plan.unpacked_bytes) {}

  // Lays out the next panels from `query_begin` on, as many as the scratch holds; returns how many.
  int lay_out(int64_t query_begin, int64_t query_end, Panel* panels) const {
    int count = 0;
    while (count < plan_.panels && query_begin < query_end) {
      panels[count] = plan_.panel(p_, scratch_, count, query_begin, query_end);
      query_begin += panels[count++].query_count;
    }
    return count;
  }

  // Computes the panels' logits and their maxima over the keys.
  void compute_logits(const Panel* panels, int count, Prefetcher& prefetcher) const {
    using Source = UnitSource<T, Unit>;
    const int64_t units = p_.head_dim / Source::kElements;
    for (int p = 0; p < count; ++p) {
      const Panel& panel = panels[p];
      pack_queries<typename Source::Type>(query_ + panel.query_begin * p_.query_strides.frame,
                                          p_.query_strides.frame, panel.query_count, panel.lanes(),
                                          units, panel.packed_queries);
      for (int i = 0; i < panel.lanes(); ++i) panel.row_max[i] = -kInfinity;
      prefetcher.step();
    }
    const int64_t step = count == 1 ? panels[0].logits_keys() : kLogitsKeys;
    for (int64_t j = 0; j < p_.frames; j += step) {
      const int keys = static_cast<int>(min64(step, p_.frames - j));
      for (int p = 0; p < count; ++p) {
        const Panel& panel = panels[p];
        prefetcher.step();
        with_vectors(panel.vectors, [&](auto vectors) {
          logits_of_keys<vectors>(keys_.from(j), keys_.stride, keys, panel.packed_queries, units,
                                  p_.scale * kLog2E, panel.logits + j * panel.lanes(),
                                  panel.row_max);
        });
      }
    }
  }

  // Returns the map's maximum where Δ's weight is that, which takes all of the map's logits. NaN is
  // larger than any number, as for torch.max.
  MapMax map_max(Prefetcher& prefetcher) const {
    MapMax result;
    if (!p_.delta || p_.stat != Stat::map_max) return result;
    Panel panels[kMaxPanels];
    for (int64_t query = 0; query < p_.frames;) {
      const int count = lay_out(query, p_.frames, panels);
      compute_logits(panels, count, prefetcher);
      for (int p = 0; p < count; ++p) {
        for (int i = 0; i < panels[p].query_count; ++i, ++query) {
          if (panels[p].row_max[i] > result.value) result = {panels[p].row_max[i], query};
        }
        if (has_nan(panels[p])) return {kNaN, panels[p].query_begin};
      }
    }
    return result;
  }

  // Turns a panel's logits into weights, up to one over their sum.
  void exponentiate_logits(const Panel& panel, const MapMax& map_max) const {
    if (p_.delta) regularize(panel, map_max);
    with_vectors(panel.vectors, [&](auto vectors) {
      exponentiate<vectors>(p_.frames, panel.row_max, panel.logits, panel.inverse_sum);
      invert<vectors>(panel.inverse_sum);
    });
  }

  const UnitRows<Unit>& keys() const { return keys_; }
  // Returns Δ of the first key and a panel's first query.
  const float* delta(const Panel& panel) const {
    return p_.delta + index_.head * p_.delta_head_stride + panel.query_begin;
  }

 private:
  // Returns whether there is NaN among a panel's logits, which their maxima do not show.
  bool has_nan(const Panel& panel) const {
    bool found = false;
    for (int64_t j = 0; j < p_.frames; ++j) {
      const float* row = panel.logits + j * panel.lanes();
      for (int i = 0; i < panel.query_count; ++i) found |= row[i] != row[i];
    }
    return found;
  }

  // Adds strength * stat * Δ to the logits. The statistic is in the logits' unit, log2 e times the
  // scaled ones.
  void regularize(const Panel& panel, const MapMax& map_max) const {
    for (int i = 0; i < panel.query_count; ++i) {
      float stat = 0.0f;
      switch (p_.stat) {
        case Stat::none: stat = kLog2E; break;
        case Stat::row_max: stat = panel.row_max[i]; break;
        case Stat::map_max: stat = map_max.value; break;
        case Stat::tensor:
          stat = index_.in(p_.stat_tensor,
                           p_.stat_strides)[(panel.query_begin + i) * p_.stat_strides.frame] *
                 kLog2E;
          break;
      }
      panel.stat[i] = stat;
      if (p_.clamp_negative && stat < 0.0f) stat = 0.0f;
      panel.delta_weight[i] = p_.strength * stat;
    }
    for (int i = panel.query_count; i < panel.lanes(); ++i) panel.delta_weight[i] = 0.0f;
    with_vectors(panel.vectors, [&](auto vectors) {
      add_bias<vectors>(delta(panel), p_.delta_key_stride, p_.frames, panel.query_count,
                        panel.delta_weight, panel.logits, panel.row_max);
    });
  }

  const Problem& p_;
  const PanelPlan& plan_;
  SequenceIndex index_;
  float* scratch_;
  const T* query_;
  UnitRows<Unit> keys_;
};

// Adds one block of keys, from `key` on, to a product over the keys: out_i = scale * sum_j
// cells[j][i] x_j for the panel's queries i. The last block writes `out`.
template <typename T>
void product_over_keys(const Panel& panel, const float* cells, const UnitRows<float>& x,
                       int64_t key, int64_t frames, int64_t head_dim, ProductOut<T> out,
                       Prefetcher& prefetcher) {
  const int64_t keys = min64(kKeyBlock, frames - key);
  out.rows = panel.query_count;
  out.is_first_block = key == 0;
  out.is_last_block = key + keys == frames;
  product<Over::keys>(cells + key * panel.lanes(), panel.lanes(), x.from(key), x.stride, keys,
                      head_dim, out, [&prefetcher] { prefetcher.step(); });
}

}  // namespace vstar::VSTAR_ISA
