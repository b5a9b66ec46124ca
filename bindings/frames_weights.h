// The attention weights of a panel's queries, frame by frame: what both directions compute.
//
// The *state* of a row and a frame of keys is the maximum m of its logits and the sum l of their
// exponentials relative to it. Logits, maxima, statistics and constants are times log2 e throughout.
// References are raised by the headroom log2(number of keys), so that weights add up to one at most:
// no sum of finite values, with weights, overflows.
#pragma once

#include "frames_rules.h"

namespace vstar::VSTAR_ISA {

// Keys of one frame that are computed together.
struct Piece {
  int64_t frame;
  int64_t place;       // of its first key in the frame
  int64_t begin, end;  // of the cells' rows

  int64_t keys() const { return end - begin; }
};

// Up to two vectors of the sorted queries, along the lanes.
struct FramePanel {
  Rows rows;
  int vectors;
  float* packed_queries;
  float* max;  // [state][lane]
  float* sum;  // [state][lane]

  FramePanel(Rows rows, float* packed_queries, float* max, float* sum)
      : rows(rows),
        vectors(rows.end - rows.begin > kLanes ? 2 : 1),
        packed_queries(packed_queries),
        max(max),
        sum(sum) {}

  int lanes() const { return vectors * kLanes; }
  int count() const { return static_cast<int>(rows.end - rows.begin); }
  // Returns the place of a lane's query; the lanes behind the last query do as that one.
  int64_t row_of(int lane) const { return min64(rows.begin + lane, rows.end - 1); }
  // State 0 is of all keys, state g + 1 of frame g.
  float* max_of(int64_t state) const { return max + state * lanes(); }
  float* sum_of(int64_t state) const { return sum + state * lanes(); }
};

// Returns x, and 0 where it is -inf: the maximum of nothing.
inline Vec finite_reference(Vec x) {
  return select_equal(x, broadcast(-kInfinity), zero(), x);
}

// Returns 1 / x, and 0 for 0.
inline Vec inverse_or_zero(Vec x) {
  return select_equal(x, zero(), zero(), div(broadcast(1.0f), x));
}

// The weights of one batch element and head.
class FrameWeights {
 public:
  // `is_split` says that what is added to a frame's logits is not known before all of them are.
  FrameWeights(const FrameArgs& args, int64_t batch, int64_t head, bool is_split)
      : a_(args), rules_(args, batch, head), batch_(batch), head_(head), is_split_(is_split) {
    while ((int64_t{1} << headroom_) < args.keys.tokens) ++headroom_;
  }

  const FrameRules& rules() const { return rules_; }

  // Sets all of a panel's states to those of no keys.
  static void clear(const FramePanel& panel, int64_t states) {
    for (int64_t i = 0; i < states * panel.lanes(); ++i) {
      panel.max[i] = -kInfinity;
      panel.sum[i] = 0.0f;
    }
  }

  // Sets a piece's constants: what is added to its logits as far as it is known, and -inf for
  // queries that it is masked for. Changes single logits where the rule does, and then, or where
  // `sets_max`, sets the maxima, which are otherwise there.
  void apply_rules(const Piece& piece, const FramePanel& panel, bool sets_max, float* cells,
                   float* constants, float* maxima) const {
    set_constants(piece, panel, constants);
    LaneRules lane;  // not read where there are neither factors nor a band
    bool has_factor = false, has_band = false;
    if (a_.factor || a_.band) set_lane_rules(piece, panel, lane, has_factor, has_band);
    if (!sets_max && !has_factor && !has_band) return;
    with_vectors(panel.vectors, [&](auto vectors) {
      const auto apply = has_factor ? has_band ? apply_lane_rules<vectors, true, true>
                                               : apply_lane_rules<vectors, true, false>
                         : has_band ? apply_lane_rules<vectors, false, true>
                                    : apply_lane_rules<vectors, false, false>;
      apply(piece.keys(), piece.place, lane, cells + piece.begin * panel.lanes(), maxima);
    });
  }

  // Turns the logits of pieces into exponentials and adds them to one state. The pieces' constants
  // become references; `risen` is what older terms of the state were multiplied by. Calls
  // after_piece(k, its sums).
  template <typename AfterPiece>
  void exponentiate(const Piece* pieces, int count, const FramePanel& panel, int64_t state,
                    float* cells, const float* maxima, float* constants, float* risen,
                    const AfterPiece& after_piece) const {
    const int lanes = panel.lanes();
    float* max_of_state = panel.max_of(state);
    float* sum_of_state = panel.sum_of(state);
    for (int c = 0; c < lanes; c += kLanes) {
      const Vec old_max = load(max_of_state + c);
      Vec new_max = old_max;
      for (int k = 0; k < count; ++k) {
        const int at = k * lanes + c;
        new_max = max(add(load(maxima + at), load(constants + at)), new_max);
      }
      store(max_of_state + c, new_max);
      const Vec reference = finite_reference(new_max);
      const Vec factor = exp2_nonpositive(sub(old_max, reference));
      store(risen + c, factor);
      store(sum_of_state + c, mul(load(sum_of_state + c), factor));
      const Vec raised = add(reference, broadcast(static_cast<float>(headroom_)));
      for (int k = 0; k < count; ++k) {
        float* constant = constants + k * lanes + c;
        store(constant, sub(raised, load(constant)));
      }
    }
    for (int k = 0; k < count; ++k) {
      float sums[kPanelQueries];
      with_vectors(panel.vectors, [&](auto vectors) {
        VSTAR_ISA::exponentiate<vectors>(pieces[k].keys(), constants + k * lanes,
                                         cells + pieces[k].begin * lanes, sums);
      });
      for (int c = 0; c < lanes; c += kLanes) {
        store(sum_of_state + c, add(load(sum_of_state + c), load(sums + c)));
      }
      after_piece(k, sums);
    }
  }

  // Adds a piece's sums, relative to state 0's maxima so far, to its frame's, which are relative to
  // those maxima when they were added to last.
  static void add_to_frame(const FramePanel& panel, int64_t frame, const float* sums) {
    for (int c = 0; c < panel.lanes(); c += kLanes) {
      float* m = panel.max_of(frame + 1) + c;
      float* s = panel.sum_of(frame + 1) + c;
      const Vec so_far = load(panel.max + c);
      const Vec factor = exp2_nonpositive(sub(load(m), finite_reference(so_far)));
      store(s, fma(load(s), factor, load(sums + c)));
      store(m, so_far);
    }
  }

  // Sets the frames' maxima to what their exponentials are multiplied by to be the weights, once
  // all states are there. Uses state 0 up.
  void set_coefficients(const FramePanel& panel, const float* stat) const {
    const int lanes = panel.lanes();
    int64_t frames[kPanelQueries];  // of the rows
    for (int i = 0; i < lanes; ++i) frames[i] = frame_of(a_.queries, panel.row_of(i));
    float* most = panel.max;
    float* total = panel.sum;
    for (int c = 0; c < lanes; c += kLanes) {
      store(most + c, broadcast(-kInfinity));
      store(total + c, zero());
    }
    for (int64_t g = 0; g <= a_.keys.frames; ++g) {
      float* m = panel.max_of(g + 1);
      for (int i = 0; i < lanes && !rules_.is_text_key(g); ++i) {
        if (rules_.is_text_query(frames[i]) || m[i] == -kInfinity) continue;
        m[i] += stat[i] * rules_.delta(frames[i], g) + rules_.offset(frames[i], g) * kLog2E;
      }
      for (int c = 0; c < lanes; c += kLanes) {
        store(most + c, max(load(m + c), load(most + c)));
      }
    }
    for (int64_t g = 0; g <= a_.keys.frames; ++g) {
      float* m = panel.max_of(g + 1);
      const float* s = panel.sum_of(g + 1);
      for (int c = 0; c < lanes; c += kLanes) {
        const Vec weight = exp2_nonpositive(sub(load(m + c), finite_reference(load(most + c))));
        store(m + c, weight);
        store(total + c, fma(weight, load(s + c), load(total + c)));
      }
    }
    for (int64_t g = 0; g <= a_.keys.frames; ++g) {
      float* m = panel.max_of(g + 1);
      for (int c = 0; c < lanes; c += kLanes) {
        store(m + c, mul(load(m + c), inverse_or_zero(load(total + c))));
      }
    }
  }

  // Sets `stat` to the rows' statistics before they are clamped, 0 where there is none, and
  // `best_frame` to the first frame of keys that has it (a float, which holds it exactly).
  void compute_stat(const FramePanel& panel, float* stat, float* best_frame) const {
    const int lanes = panel.lanes();
    if (!is_from_logits(a_)) {
      for (int i = 0; i < lanes; ++i) stat[i] = given_stat(panel.row_of(i));
      return;
    }
    for (int c = 0; c < lanes; c += kLanes) {
      Vec m = broadcast(-kInfinity), which = zero();
      for (int64_t g = 0; g < a_.keys.frames; ++g) {
        const Vec x = load(panel.max_of(g + 1) + c);
        which = select_less(m, x, broadcast(static_cast<float>(g)), which);
        m = max(x, m);
      }
      store(stat + c, m);
      store(best_frame + c, which);
    }
    if (a_.stat == FrameStat::frame_max) {
      // max_g (l_g / P_g) 2^(m_g - m), the maximum over frames in the numbers' own domain.
      float best[kPanelQueries], counts[kPanelQueries];
      for (int c = 0; c < lanes; c += kLanes) store(best + c, zero());
      for (int64_t g = 0; g < a_.keys.frames; ++g) {
        count_keys(panel, g, counts);
        for (int c = 0; c < lanes; c += kLanes) {
          const Vec below = sub(load(panel.max_of(g + 1) + c), finite_reference(load(stat + c)));
          const Vec mean = div(load(panel.sum_of(g + 1) + c), load(counts + c));
          const Vec x = mul(mean, exp2_nonpositive(below)), so_far = load(best + c);
          const Vec frame = broadcast(static_cast<float>(g));
          store(best_frame + c, select_less(so_far, x, frame, load(best_frame + c)));
          store(best + c, max(x, so_far));
        }
      }
      for (int i = 0; i < lanes; ++i) {
        if (stat[i] != -kInfinity) {
          stat[i] += static_cast<float>(headroom_) + __builtin_log2f(best[i]);
        }
      }
    }
    for (int i = 0; i < lanes; ++i) {
      if (stat[i] == -kInfinity) stat[i] = 0.0f;
    }
  }

  // Clamps statistics where that is asked for.
  void clamp(const FramePanel& panel, float* stat) const {
    if (!a_.clamp_negative) return;
    for (int i = 0; i < panel.lanes(); ++i) {
      if (stat[i] < 0.0f) stat[i] = 0.0f;
    }
  }

  // Returns whether the statistic comes from the logits themselves.
  static bool is_from_logits(const FrameArgs& a) {
    return a.delta && (a.stat == FrameStat::row_max || a.stat == FrameStat::frame_max);
  }

 private:
  // Calls body(query frame, first lane, end) for each run of lanes whose queries are of one frame.
  template <typename Body>
  void for_each_run(const FramePanel& panel, const Body& body) const {
    const int lanes = panel.lanes();
    for (int i = 0; i < lanes;) {
      const int64_t f = frame_of(a_.queries, panel.row_of(i));
      const int64_t frame_end = a_.queries.begin[f + 1];
      const int end = frame_end < panel.rows.end ? static_cast<int>(frame_end - panel.rows.begin)
                                                 : lanes;
      body(f, i, end);
      i = end;
    }
  }

  // Sets a piece's constants: most rules have one for all lanes of a frame.
  void set_constants(const Piece& piece, const FramePanel& panel, float* constants) const {
    if (rules_.is_text_key(piece.frame) || (!a_.offset && (is_split_ || !a_.delta))) {
      for (int c = 0; c < panel.lanes(); c += kLanes) store(constants + c, zero());
      return;
    }
    for_each_run(panel, [&](int64_t f, int first, int end) {
      const bool is_free = rules_.is_text_query(f);
      const float offset = is_free ? 0.0f : rules_.offset(f, piece.frame) * kLog2E;
      const float delta = is_free || is_split_ ? 0.0f : rules_.delta(f, piece.frame);
      const float constant = is_split_ && offset != -kInfinity ? 0.0f : offset;
      for (int i = first; i < end; ++i) constants[i] = constant;
      if (delta == 0.0f) return;
      for (int i = first; i < end; ++i) constants[i] += given_stat(panel.row_of(i)) * delta;
    });
  }

  // Sets what changes single logits of a piece, and whether factors or a band do.
  void set_lane_rules(const Piece& piece, const FramePanel& panel, LaneRules& lane,
                      bool& has_factor, bool& has_band) const {
    const float first = static_cast<float>(piece.place);
    const float end = static_cast<float>(piece.place + piece.keys());
    for_each_run(panel, [&](int64_t f, int first_lane, int end_lane) {
      const bool is_free = rules_.is_text_query(f) || rules_.is_text_key(piece.frame);
      for (int i = first_lane; i < end_lane; ++i) {
        lane.low[i] = lane.span_low[i] = -kInfinity;
        lane.high[i] = lane.span_high[i] = kInfinity;
        lane.positive[i] = lane.negative[i] = 1.0f;
        if (is_free) continue;
        const int64_t place = panel.row_of(i) - a_.queries.begin[f];
        if (a_.band) {
          lane.low[i] = static_cast<float>(place + rules_.band(0, f, piece.frame));
          lane.high[i] = static_cast<float>(place + rules_.band(1, f, piece.frame) + 1);
          has_band = has_band || lane.low[i] > first || lane.high[i] < end;
        }
        if (a_.factor) {
          lane.positive[i] = rules_.factor(0, f, piece.frame);
          lane.negative[i] = rules_.factor(1, f, piece.frame);
          if (a_.factor_span) {
            lane.span_low[i] = static_cast<float>(place + rules_.factor_span(0, f, piece.frame));
            lane.span_high[i] =
                static_cast<float>(place + rules_.factor_span(1, f, piece.frame) + 1);
          }
          has_factor = has_factor || ((lane.positive[i] != 1.0f || lane.negative[i] != 1.0f) &&
                                      lane.span_low[i] < end && lane.span_high[i] > first);
        }
      }
    });
  }

  // Returns the statistic of a row that is known beforehand.
  float given_stat(int64_t row) const {
    if (a_.stat != FrameStat::tensor) return kLog2E;
    const Strides& s = a_.stat_strides;
    const float stat = a_.stat_tensor[batch_ * s.batch + a_.queries.order[row] * s.frame +
                                      head_ * s.head];
    return a_.clamp_negative && stat < 0.0f ? 0.0f : stat * kLog2E;
  }

  // Sets how many keys of a frame each row sees, or 1 if none.
  void count_keys(const FramePanel& panel, int64_t key_frame, float* counts) const {
    const int64_t count = rules_.keys_of(key_frame);
    for (int i = 0; i < panel.lanes(); ++i) {
      counts[i] = static_cast<float>(max64(count, 1));
      if (!a_.band) continue;
      const int64_t r = panel.row_of(i), f = frame_of(a_.queries, r);
      const int64_t place = r - a_.queries.begin[f];
      const Rows seen = rules_.visible(f, place, place, key_frame, count);
      counts[i] = static_cast<float>(max64(seen.end - seen.begin, 1));
    }
  }

  const FrameArgs& a_;
  FrameRules rules_;
  int64_t batch_, head_;
  bool is_split_;
  int headroom_ = 0;
};

}  // namespace vstar::VSTAR_ISA
