// What a rule over frames says about rows of queries: which keys they see, and what is done to their
// logits, which is the same for all keys of one frame but for factors' signs and spans.
#pragma once

#include "frames.h"
#include "loops.h"
#include "microkernels.h"
#include "panel.h"

namespace vstar::VSTAR_ISA {

// Places [begin, end) in the order of tokens sorted by frame.
struct Rows {
  int64_t begin, end;

  bool is_empty() const { return begin >= end; }
};

inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

// Returns the frame of a place in the order of tokens.
inline int64_t frame_of(const FrameOrder& order, int64_t row) {
  int64_t low = 0, high = order.frames;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (order.begin[middle + 1] <= row) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// A rule, as one batch element and head sees it.
class FrameRules {
 public:
  FrameRules(const FrameArgs& args, int64_t batch, int64_t head)
      : a_(args), head_(head), length_(args.key_lengths ? args.key_lengths[batch] : kAllKeys) {}

  bool is_text_query(int64_t frame) const { return frame == a_.queries.frames; }
  bool is_text_key(int64_t frame) const { return frame == a_.keys.frames; }

  // Returns how many keys of a frame there are: its first ones, as its positions ascend.
  int64_t keys_of(int64_t frame) const {
    const int64_t begin = a_.keys.begin[frame];
    int64_t low = begin, high = a_.keys.begin[frame + 1];
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (a_.keys.order[middle] < length_) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low - begin;
  }

  // Returns the keys of a frame, by their places in it, that one of the queries at the places
  // [first, last] of a frame sees, of the `count` that there are.
  Rows visible(int64_t query_frame, int64_t first, int64_t last, int64_t key_frame,
               int64_t count) const {
    if (is_text_query(query_frame) || is_text_key(key_frame)) return {0, count};
    if (offset(query_frame, key_frame) == -kInfinity) return {0, 0};
    if (!a_.band) return {0, count};
    return {max64(0, first + band(0, query_frame, key_frame)),
            min64(count, last + band(1, query_frame, key_frame) + 1)};
  }

  // Returns the keys of a frame that lie between all those that one of the queries sees.
  Rows visible_to_any(Rows queries, int64_t key_frame, int64_t count) const {
    Rows all = {count, 0};
    for (int64_t row = queries.begin; row < queries.end;) {
      const int64_t frame = frame_of(a_.queries, row), begin = a_.queries.begin[frame];
      const int64_t end = min64(a_.queries.begin[frame + 1], queries.end);
      const Rows some = visible(frame, row - begin, end - 1 - begin, key_frame, count);
      if (!some.is_empty()) all = {min64(all.begin, some.begin), max64(all.end, some.end)};
      row = end;
    }
    return all;
  }

  float delta(int64_t query_frame, int64_t key_frame) const {
    return a_.delta ? a_.delta[entry(a_.delta_head_stride, query_frame, key_frame)] : 0.0f;
  }
  float offset(int64_t query_frame, int64_t key_frame) const {
    return a_.offset ? a_.offset[entry(a_.offset_head_stride, query_frame, key_frame)] : 0.0f;
  }
  // Returns the factor of positive logits (sign 0) or of the others (sign 1).
  float factor(int sign, int64_t query_frame, int64_t key_frame) const {
    return a_.factor[sign * a_.factor_sign_stride +
                     entry(a_.factor_head_stride, query_frame, key_frame)];
  }
  // Returns the lower (bound 0) or upper (bound 1) bound.
  int64_t band(int bound, int64_t query_frame, int64_t key_frame) const {
    return bound_of(a_.band, bound, query_frame, key_frame);
  }
  int64_t factor_span(int bound, int64_t query_frame, int64_t key_frame) const {
    return bound_of(a_.factor_span, bound, query_frame, key_frame);
  }

 private:
  static constexpr int64_t kAllKeys = int64_t{1} << 62;

  int64_t entry(int64_t head_stride, int64_t query_frame, int64_t key_frame) const {
    return head_ * head_stride + query_frame * a_.keys.frames + key_frame;
  }
  int64_t bound_of(const int32_t* table, int bound, int64_t query_frame,
                   int64_t key_frame) const {
    return table[bound * a_.queries.frames * a_.keys.frames + entry(0, query_frame, key_frame)];
  }

  const FrameArgs& a_;
  int64_t head_, length_;
};

// What changes single logits of a panel's queries with one frame of keys. Bounds are places of keys.
struct LaneRules {
  float low[kPanelQueries], high[kPanelQueries];            // visible are low <= place < high
  float span_low[kPanelQueries], span_high[kPanelQueries];  // and so the factors hold
  float positive[kPanelQueries], negative[kPanelQueries];   // the factors
};

// Multiplies logits by factors and hides those of keys outside of bands, where the template says so;
// sets `max` to the maxima. `place` is the first key's in its frame.
template <int VECTORS, bool FACTOR, bool BAND>
VSTAR_STAGE void apply_lane_rules(int64_t keys, int64_t place, const LaneRules& rules,
                                  float* logits, float* max_of_lanes) {
  const Vec one = broadcast(1.0f), hidden = broadcast(-kInfinity);
  for (int c = 0; c < VECTORS; ++c) {
    const int lane = c * kLanes;
    const Vec low = load(rules.low + lane), high = load(rules.high + lane);
    const Vec span_low = load(rules.span_low + lane), span_high = load(rules.span_high + lane);
    const Vec positive = load(rules.positive + lane), negative = load(rules.negative + lane);
    Vec m = hidden;
    for (int64_t j = 0; j < keys; ++j) {
      float* cell = logits + (j * VECTORS + c) * kLanes;
      const Vec p = broadcast(static_cast<float>(place + j));
      Vec x = load(cell);
      if (FACTOR) {
        Vec factor = select_less(zero(), x, positive, negative);
        factor = select_less(p, span_low, one, select_less(p, span_high, factor, one));
        x = mul(x, factor);
      }
      if (BAND) x = select_less(p, low, hidden, select_less(p, high, x, hidden));
      if (FACTOR || BAND) store(cell, x);
      m = max(m, x);
    }
    store(max_of_lanes + lane, m);
  }
}

}  // namespace vstar::VSTAR_ISA
