// A panel: the queries that are computed together, and a thread's scratch, where panels lie.
//
// A panel is one or two vectors of queries, with the queries along the lanes throughout. What
// belongs to (key, query) is a matrix of *cells*, one row of lanes for each key, and stays in the
// nearest caches.
#pragma once

#include "loops.h"
#include "types.h"

namespace vstar::VSTAR_ISA {

constexpr int kMaxVectors = 2;
constexpr int kPanelQueries = kMaxVectors * kLanes;
constexpr int kMaxPanels = 4;  // that are in the scratch at once
constexpr int kFewPanels = 4;  // where more read K and V, a copy of these pays

struct Panel {
  int64_t query_begin;  // of the sequence
  int query_count;
  int vectors;
  float* packed_queries;
  float* logits;  // cells
  // One float for each query.
  float* row_max;
  float* stat;          // of the logits, times log2 e, before it is clamped
  float* delta_weight;  // what Δ is multiplied by, strength * stat
  float* inverse_sum;

  int lanes() const { return vectors * kLanes; }
  // Returns how many keys logits_of_keys() takes at once.
  int64_t logits_keys() const { return kMaxVectors / vectors * kLogitsKeys; }
};

// Where each array of a thread's scratch begins (in floats): those that both directions have.
struct PanelPlan {
  int64_t panels;       // that are there at once, at most kMaxPanels
  int64_t padded_keys;  // rows of cells, in whole tiles of products over queries
  int64_t padded_dim;
  int64_t unpacked_bytes;  // up to which K and V each are read where they lie
  int64_t queries, logits, keys, values, statistics;
  int64_t size = 0;

  PanelPlan(const Problem& p, int64_t panels_at_once)
      : panels(panels_at_once),
        padded_keys(round_up(p.frames, kProductRows)),
        padded_dim(round_up(p.head_dim, kLanes)),
        unpacked_bytes(divide_up(p.frames, kPanelQueries) <= kFewPanels ? 48 << 10 : 0) {
    const int64_t lanes = panels * kPanelQueries;
    queries = take(lanes * p.head_dim);
    logits = take(lanes * padded_keys);
    keys = take(p.frames * p.head_dim);
    values = take(p.frames * p.head_dim);
    statistics = take(kStatistics * lanes);
  }

  // Returns where an array of this many floats begins.
  int64_t take(int64_t floats) {
    const int64_t start = size;
    size += round_up(floats, 16);  // a cache line
    return start;
  }

  // Returns the panel of the queries from `query_begin` up to `query_end`, or of as many of them as
  // a panel holds, at the scratch's place `index`.
  Panel panel(const Problem& p, float* scratch, int64_t index, int64_t query_begin,
              int64_t query_end) const {
    float* of_queries = scratch + statistics + kStatistics * index * kPanelQueries;
    const int64_t count = min64(query_end - query_begin, kPanelQueries);
    return {query_begin,
            static_cast<int>(count),
            count > kLanes ? 2 : 1,
            scratch + queries + index * kPanelQueries * p.head_dim,
            scratch + logits + index * kPanelQueries * padded_keys,
            of_queries,
            of_queries + kPanelQueries,
            of_queries + 2 * kPanelQueries,
            of_queries + 3 * kPanelQueries};
  }

 private:
  static constexpr int64_t kStatistics = 4;  // floats that a query has
};

}  // namespace vstar::VSTAR_ISA
