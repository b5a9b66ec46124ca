// The gradients of attention over frames of tokens, once for every instruction set.
//
// As in backward.h nothing is kept from the forward: a panel's exponentials e are computed again, of
// all the keys that it sees, and so its coefficients (frames_weights.h): P = coefficient_g e. With G
// the gradient to the mean map divided by what the mean is over, which is one number for a row and a
// frame as the bias is, and g the frame of key j:
//
//     dP_ij = v_j . do_i + G_ig                    D_i = sum_j P_ij dP_ij
//     dS_ij = P_ij (dP_ij - D_i) + c_i ds_i/dx_ij  c_i = sum_g delta_g sum_{j in g} P (dP - D)
//
// where s is the statistic: dx is 1 at the first of the largest logits for row_max, and e_ij / l_g in
// the frame whose mean is largest for frame_max. D and c need sums over frames alone, so the cells
// are gone over twice. The rest is as in backward.h: dv, dk are products over the panel's queries,
// dq is one over keys. Keys and values lie sorted by frame, in float32, for all panels.
//
// An item is a part of the queries of the heads that share a key head; parts' sums of dk and dv are
// added up in their order when all are done.
#pragma once

#include "frames_weights.h"
#include "gradients.h"
#include "packing.h"

namespace vstar::VSTAR_ISA {

struct FramesBackwardPlan {
  int64_t padded_dim, states;
  int64_t keys, values;        // [sorted key][padded_dim]
  int64_t cells, grads;        // of all keys that a panel sees
  int64_t queries, grad_outs;  // packed
  int64_t query_rows, grad_rows, grad_queries;  // [lane][padded_dim]
  int64_t max, sum, argmax, dots, map_grads;    // [state][lane]
  int64_t size = 0;

  explicit FramesBackwardPlan(const FrameBackwardArgs& a)
      : padded_dim(round_up(a.head_dim, kLanes)), states(a.keys.frames + 2) {
    const int64_t tokens = round_up(a.keys.tokens, kProductRows) + kProductRows;
    keys = take(tokens * padded_dim);
    values = take(tokens * padded_dim);
    cells = take(tokens * kPanelQueries);
    grads = take(tokens * kPanelQueries);
    queries = take(padded_dim * kPanelQueries);
    grad_outs = take(padded_dim * kPanelQueries);
    query_rows = take(padded_dim * kPanelQueries);
    grad_rows = take(padded_dim * kPanelQueries);
    grad_queries = take(padded_dim * kPanelQueries);
    max = take(states * kPanelQueries);
    sum = take(states * kPanelQueries);
    argmax = take(states * kPanelQueries);
    dots = take(states * kPanelQueries);
    map_grads = take(states * kPanelQueries);
  }

  int64_t take(int64_t floats) {
    const int64_t start = size;
    size += round_up(floats, 16);  // a cache line
    return start;
  }
};

// Sets dot[i] = sum_j cells[j][i] grads[j][i].
template <int VECTORS>
VSTAR_STAGE void dot_cells(int64_t keys, const float* cells, const float* grads, float* dot) {
  sum_over_keys<VECTORS>(keys, dot, [&](Vec sum, int64_t j, int c) VSTAR_INLINE {
    const int64_t cell = (j * VECTORS + c) * kLanes;
    return fma(load(cells + cell), load(grads + cell), sum);
  });
}

// Turns a frame's exponentials into weights, coefficient * cells, and the gradients to weights into
// those to logits, cells * (coefficient * (grads + shift) + extra).
template <int VECTORS>
VSTAR_STAGE void frame_softmax_gradient(int64_t keys, const float* coefficient,
                                        const float* shift, const float* extra, float* cells,
                                        float* grads) {
  for (int c = 0; c < VECTORS; ++c) {
    const int lane = c * kLanes;
    const Vec w = load(coefficient + lane), s = load(shift + lane), x = load(extra + lane);
    for (int64_t j = 0; j < keys; ++j) {
      const int64_t cell = (j * VECTORS + c) * kLanes;
      const Vec e = load(cells + cell);
      store(grads + cell, mul(e, fma(w, add(load(grads + cell), s), x)));
      store(cells + cell, mul(e, w));
    }
  }
}

// Computes the gradients of one item, whose tensors hold T.
template <typename T>
class FrameGradients {
 public:
  FrameGradients(const FrameBackwardArgs& args, int64_t item, float* scratch)
      : a_(args),
        plan_(args),
        scratch_(scratch),
        part_(item % args.parts),
        batch_(item / args.parts / args.key_heads),
        key_head_(item / args.parts % args.key_heads),
        key_sums_(args.sums + item * 2 * args.keys.tokens * plan_.padded_dim),
        value_sums_(key_sums_ + args.keys.tokens * plan_.padded_dim) {}

  void compute() {
    for (int64_t i = 0; i < 2 * a_.keys.tokens * plan_.padded_dim; ++i) key_sums_[i] = 0.0f;
    float* keys = scratch_ + plan_.keys;
    float* values = scratch_ + plan_.values;
    for (int64_t i = 0; i < a_.keys.tokens; ++i) {
      const int64_t token = a_.keys.order[i];
      pack_padded_rows(row<T>(a_.key, a_.key_strides, key_head_, token), 0, 1, a_.head_dim,
                       keys + i * plan_.padded_dim);
      pack_padded_rows(row<T>(a_.value, a_.value_strides, key_head_, token), 0, 1, a_.head_dim,
                       values + i * plan_.padded_dim);
    }
    const int64_t panels = divide_up(a_.queries.tokens, kPanelQueries);
    const int64_t group = a_.heads / a_.key_heads;
    for (int64_t head = key_head_ * group; head < (key_head_ + 1) * group; ++head) {
      for (int64_t p = part_ * panels / a_.parts; p < (part_ + 1) * panels / a_.parts; ++p) {
        compute_panel(head, p * kPanelQueries);
      }
    }
  }

  // Adds the sums of the item's later parts to this one, the first, and writes dk and dv.
  void finish() const {
    add_up_parts(key_sums_, 2 * a_.keys.tokens * plan_.padded_dim, a_.parts);
    for (int64_t i = 0; i < a_.keys.tokens; ++i) {
      const int64_t token = a_.keys.order[i], at = i * plan_.padded_dim;
      write_row(key_sums_ + at, a_.scale, a_.head_dim,
                row(static_cast<T*>(a_.grad_key), a_.grad_key_strides, key_head_, token));
      write_row(value_sums_ + at, 1.0f, a_.head_dim,
                row(static_cast<T*>(a_.grad_value), a_.grad_value_strides, key_head_, token));
    }
  }

 private:
  template <typename Element>
  Element* row(Element* tensor, const Strides& s, int64_t head, int64_t token) const {
    return tensor + batch_ * s.batch + head * s.head + token * s.frame;
  }
  template <typename Element>
  const Element* row(const void* tensor, const Strides& s, int64_t head, int64_t token) const {
    return row(static_cast<const Element*>(tensor), s, head, token);
  }
  float* sorted_key(float* rows, const Piece& piece) const {
    return rows + (a_.keys.begin[piece.frame] + piece.place) * plan_.padded_dim;
  }

  void compute_panel(int64_t head, int64_t first) {
    const FrameWeights weights(a_, batch_, head, true);
    const FramePanel panel({first, min64(first + kPanelQueries, a_.queries.tokens)},
                           scratch_ + plan_.queries, scratch_ + plan_.max, scratch_ + plan_.sum);
    pack_rows_of(panel, head);
    FrameWeights::clear(panel, plan_.states);
    float stat[kPanelQueries], best_frame[kPanelQueries];
    compute_exponentials(weights, panel);
    weights.compute_stat(panel, stat, best_frame);
    choose_maxima(panel, stat, best_frame);
    bool passes[kPanelQueries];
    for (int i = 0; i < panel.lanes(); ++i) {
      // The gradient passes where the statistic is the border itself.
      passes[i] = !a_.clamp_negative || stat[i] >= 0.0f;
    }
    weights.clamp(panel, stat);
    weights.set_coefficients(panel, stat);
    compute_gradients_to_weights(weights, panel, head);
    compute_gradients_to_logits(weights, panel, passes, best_frame);
    add_products(weights, panel, head);
  }

  // Calls body(piece) for the keys of each frame that the panel sees; their cells are in its rows.
  template <typename Body>
  void for_each_frame(const FrameWeights& weights, const FramePanel& panel,
                      const Body& body) const {
    int64_t cells = 0;
    for (int64_t g = 0; g <= a_.keys.frames; ++g) {
      const FrameRules& rules = weights.rules();
      const Rows keys = rules.visible_to_any(panel.rows, g, rules.keys_of(g));
      if (keys.is_empty()) continue;
      const int64_t count = keys.end - keys.begin;
      body(Piece{g, keys.begin, cells, cells + count});
      cells += count;
    }
  }

  // Packs the panel's queries and gradients to outputs, and copies their rows.
  void pack_rows_of(const FramePanel& panel, int64_t head) const {
    const int64_t pd = plan_.padded_dim;
    for (int i = 0; i < panel.count(); ++i) {
      const int64_t token = a_.queries.order[panel.rows.begin + i];
      pack_padded_rows(row<T>(a_.query, a_.query_strides, head, token), 0, 1, a_.head_dim,
                       scratch_ + plan_.query_rows + i * pd);
      pack_padded_rows(row<T>(a_.grad_out, a_.grad_out_strides, head, token), 0, 1, a_.head_dim,
                       scratch_ + plan_.grad_rows + i * pd);
    }
    pack_queries<float>(scratch_ + plan_.query_rows, pd, panel.count(), panel.lanes(), pd,
                        scratch_ + plan_.queries);
    pack_queries<float>(scratch_ + plan_.grad_rows, pd, panel.count(), panel.lanes(), pd,
                        scratch_ + plan_.grad_outs);
  }

  // Multiplies a piece's sorted rows by packed rows of the panel.
  void multiply(const FramePanel& panel, const Piece& piece, const float* rows,
                const float* packed, float scale, float* cells, float* maxima) const {
    const int64_t pd = plan_.padded_dim;
    with_vectors(panel.vectors, [&](auto vectors) {
      for (int64_t j = 0; j < piece.keys(); j += kLogitsKeys) {
        logits_of_keys<vectors>(rows + j * pd, pd,
                                static_cast<int>(min64(kLogitsKeys, piece.keys() - j)), packed, pd,
                                scale, cells + (piece.begin + j) * panel.lanes(), maxima);
      }
    });
  }

  void compute_exponentials(const FrameWeights& weights, const FramePanel& panel) const {
    float* cells = scratch_ + plan_.cells;
    for_each_frame(weights, panel, [&](const Piece& piece) {
      float maxima[kPanelQueries], constants[kPanelQueries], risen[kPanelQueries];
      for (float& m : maxima) m = -kInfinity;
      multiply(panel, piece, sorted_key(scratch_ + plan_.keys, piece), panel.packed_queries,
               a_.scale * kLog2E, cells, maxima);
      weights.apply_rules(piece, panel, false, cells, constants, maxima);
      if (a_.delta && a_.stat == FrameStat::row_max) {
        with_vectors(panel.vectors, [&](auto vectors) {
          row_argmax<vectors>(piece.keys(), cells + piece.begin * panel.lanes(), maxima,
                              scratch_ + plan_.argmax + piece.frame * panel.lanes());
        });
        for (int i = 0; i < panel.lanes(); ++i) {
          scratch_[plan_.argmax + piece.frame * panel.lanes() + i] +=
              static_cast<float>(piece.place);
        }
      }
      weights.exponentiate(&piece, 1, panel, piece.frame + 1, cells, maxima, constants, risen,
                           [](int, const float*) {});
    });
  }

  // Where several frames have a row's largest logit, that of the first key in the sequence is it.
  void choose_maxima(const FramePanel& panel, const float* stat, float* best_frame) const {
    if (!a_.delta || a_.stat != FrameStat::row_max) return;
    for (int i = 0; i < panel.lanes(); ++i) {
      int64_t first = a_.keys.tokens;
      for (int64_t g = 0; g < a_.keys.frames; ++g) {
        if (panel.max_of(g + 1)[i] != stat[i]) continue;
        const int64_t place = key_of_maximum(panel, g, i);
        const int64_t token = a_.keys.order[a_.keys.begin[g] + place];
        if (token < first) {
          first = token;
          best_frame[i] = static_cast<float>(g);
        }
      }
    }
  }
  int64_t key_of_maximum(const FramePanel& panel, int64_t frame, int lane) const {
    return static_cast<int64_t>(scratch_[plan_.argmax + frame * panel.lanes() + lane]);
  }

  // Sets the cells' gradients to do v', and each frame's G and sum_j e (do v').
  void compute_gradients_to_weights(const FrameWeights& weights, const FramePanel& panel,
                                    int64_t head) const {
    const int lanes = panel.lanes();
    for_each_frame(weights, panel, [&](const Piece& piece) {
      float maxima[kPanelQueries];  // of no use here
      for (float& m : maxima) m = 0.0f;
      multiply(panel, piece, sorted_key(scratch_ + plan_.values, piece),
               scratch_ + plan_.grad_outs, 1.0f, scratch_ + plan_.grads, maxima);
      with_vectors(panel.vectors, [&](auto vectors) {
        dot_cells<vectors>(piece.keys(), scratch_ + plan_.cells + piece.begin * lanes,
                           scratch_ + plan_.grads + piece.begin * lanes,
                           scratch_ + plan_.dots + piece.frame * lanes);
      });
      for (int i = 0; i < lanes; ++i) {
        scratch_[plan_.map_grads + piece.frame * lanes + i] =
            map_gradient(head, panel.row_of(i), piece.frame);
      }
    });
  }

  float map_gradient(int64_t head, int64_t query, int64_t key_frame) const {
    if (!a_.grad_map) return 0.0f;
    const int64_t f = frame_of(a_.queries, query), frames = a_.queries.frames;
    if (f == frames) return 0.0f;
    const int64_t map = a_.map_by_head ? batch_ * a_.heads + head : batch_;
    const int64_t heads = a_.map_by_head ? 1 : a_.heads;
    const int64_t count = (a_.queries.begin[f + 1] - a_.queries.begin[f]) * heads;
    return a_.grad_map[(map * frames + f) * (a_.keys.frames + 1) + key_frame] /
           static_cast<float>(count);
  }

  // Sets the cells to weights, and their gradients to those of the logits.
  void compute_gradients_to_logits(const FrameWeights& weights, const FramePanel& panel,
                                   const bool* passes, const float* best_frame) const {
    const int lanes = panel.lanes();
    const bool through_stat = FrameWeights::is_from_logits(a_);
    float mean[kPanelQueries] = {}, to_stat[kPanelQueries] = {};
    // sum_j P dP of a frame, and sum_j P.
    const auto dot = [&](int64_t g, int i) {
      const int at = static_cast<int>(g * lanes + i);
      return panel.max_of(g + 1)[i] *
             (scratch_[plan_.dots + at] + scratch_[plan_.map_grads + at] * panel.sum_of(g + 1)[i]);
    };
    const auto mass = [&](int64_t g, int i) {
      return panel.max_of(g + 1)[i] * panel.sum_of(g + 1)[i];
    };
    for_each_frame(weights, panel, [&](const Piece& piece) {
      for (int i = 0; i < lanes; ++i) mean[i] += dot(piece.frame, i);
    });
    if (through_stat) {
      for_each_frame(weights, panel, [&](const Piece& piece) {
        for (int i = 0; i < lanes; ++i) {
          const int64_t f = frame_of(a_.queries, panel.row_of(i)), g = piece.frame;
          if (!passes[i] || weights.rules().is_text_query(f) || weights.rules().is_text_key(g)) {
            continue;
          }
          to_stat[i] += weights.rules().delta(f, g) * (dot(g, i) - mean[i] * mass(g, i));
        }
      });
    }
    for_each_frame(weights, panel, [&](const Piece& piece) {
      float shift[kPanelQueries], extra[kPanelQueries];
      const int64_t g = piece.frame;
      for (int i = 0; i < lanes; ++i) {
        shift[i] = scratch_[plan_.map_grads + g * lanes + i] - mean[i];
        const float sum = panel.sum_of(g + 1)[i];
        const bool is_best = through_stat && a_.stat == FrameStat::frame_max &&
                             best_frame[i] == static_cast<float>(g) && sum != 0.0f;
        extra[i] = is_best ? to_stat[i] / sum : 0.0f;
      }
      float* grads = scratch_ + plan_.grads + piece.begin * lanes;
      with_vectors(panel.vectors, [&](auto vectors) {
        frame_softmax_gradient<vectors>(piece.keys(), panel.max_of(g + 1), shift, extra,
                                        scratch_ + plan_.cells + piece.begin * lanes, grads);
      });
      if (!through_stat || a_.stat != FrameStat::row_max) return;
      for (int i = 0; i < panel.count(); ++i) {
        if (best_frame[i] != static_cast<float>(g) || panel.sum_of(g + 1)[i] == 0.0f) continue;
        grads[(key_of_maximum(panel, g, i) - piece.place) * lanes + i] += to_stat[i];
      }
    });
  }

  void add_products(const FrameWeights& weights, const FramePanel& panel, int64_t head) const {
    const int64_t pd = plan_.padded_dim;
    const int lanes = panel.lanes();
    float* grad_queries = scratch_ + plan_.grad_queries;
    for (int64_t i = 0; i < pd * kPanelQueries; ++i) grad_queries[i] = 0.0f;
    for_each_frame(weights, panel, [&](const Piece& piece) {
      const float* cells = scratch_ + plan_.cells + piece.begin * lanes;
      const float* grads = scratch_ + plan_.grads + piece.begin * lanes;
      product<Over::queries>(cells, lanes, scratch_ + plan_.grad_rows, pd, panel.count(), pd,
                             RowSums{sorted_key(value_sums_, piece), pd, piece.keys()}, [] {});
      product<Over::queries>(grads, lanes, scratch_ + plan_.query_rows, pd, panel.count(), pd,
                             RowSums{sorted_key(key_sums_, piece), pd, piece.keys()}, [] {});
      const float* keys = sorted_key(scratch_ + plan_.keys, piece);
      for (int64_t j = 0; j < piece.keys(); j += kKeyBlock) {
        product<Over::keys>(grads + j * lanes, lanes, keys + j * pd, pd,
                            min64(kKeyBlock, piece.keys() - j), pd,
                            RowSums{grad_queries, pd, panel.count()}, [] {});
      }
    });
    for (int i = 0; i < panel.count(); ++i) {
      write_row(grad_queries + i * pd, a_.scale, a_.head_dim,
                row(static_cast<T*>(a_.grad_query), a_.grad_query_strides, head,
                    a_.queries.order[panel.rows.begin + i]));
    }
  }

  const FrameBackwardArgs& a_;
  const FramesBackwardPlan plan_;
  float* scratch_;
  int64_t part_, batch_, key_head_;
  float *key_sums_, *value_sums_;
};

inline int64_t frames_backward_scratch(const FrameBackwardArgs& a) {
  return FramesBackwardPlan(a).size;
}

template <typename T>
void frames_backward_typed(const FrameBackwardArgs& a, int64_t item, float* scratch) {
  FrameGradients<T>(a, item, scratch).compute();
}

inline void frames_backward(const FrameBackwardArgs& a, int64_t item, float* scratch) {
  switch (a.type) {
    case ScalarType::float32: return frames_backward_typed<float>(a, item, scratch);
    case ScalarType::bfloat16: return frames_backward_typed<bfloat16>(a, item, scratch);
    case ScalarType::float16: return frames_backward_typed<float16>(a, item, scratch);
  }
}

inline void frames_backward_finish(const FrameBackwardArgs& a, int64_t sequence) {
  const int64_t item = sequence * a.parts;
  switch (a.type) {
    case ScalarType::float32: return FrameGradients<float>(a, item, nullptr).finish();
    case ScalarType::bfloat16: return FrameGradients<bfloat16>(a, item, nullptr).finish();
    case ScalarType::float16: return FrameGradients<float16>(a, item, nullptr).finish();
  }
}

}  // namespace vstar::VSTAR_ISA
