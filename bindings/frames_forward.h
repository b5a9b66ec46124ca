// Attention over frames of tokens in one pass, once for every instruction set.
//
// A bias that depends on frames alone is one number c for all keys that a query (a row) has in a key
// frame g, so a row's softmax is a merge of softmaxes over single frames:
//
//     m_g = max_j x_j,  l_g = sum_j 2^(x_j - m_g),  O_g = sum_j 2^(x_j - m_g) v_j      j in frame g
//     out = sum_g w_g O_g / sum_g w_g l_g,          w_g = 2^(m_g + c_g - max over frames)
//
// with x the logits times log2 e. Tokens are sorted by frame (frames.h), so that a frame's keys lie
// together wherever they are in the sequence. A block of queries goes once over the keys that any of
// them sees, chunk by chunk of kKeyBlock keys: the chunk's K and V are packed, for the nearest cache
// and all of the block's panels; a panel's logits with them never leave the first cache. There is
// one exponential for each logit, which serves all sums.
//
// Where c is known beforehand (no statistic, or one that is given), all keys add to one *state*
// (maximum, sum) and one *accumulator* of a row: c goes into the exponent's reference, and when a
// chunk raises the maximum, what was added up is scaled where it is added to. Where the statistic
// comes from the logits themselves, each frame has a state and an accumulator of its own, and they
// are merged when the block's last chunk has made the statistic known. The mean map needs each
// frame's sum, so then frames have states in both ways.
//
// References are raised by the headroom log2(number of keys), so that weights add up to one at most,
// and no sum of finite values overflows.
#pragma once

#include "frames_rules.h"
#include "packing.h"

namespace vstar::VSTAR_ISA {

// Keys of one frame in a chunk.
struct Piece {
  int64_t frame;
  int64_t place;   // of its first key in the frame
  int begin, end;  // in the chunk
};

// At most kKeyBlock keys, in pieces.
struct Chunk {
  int pieces = 0, keys = 0;
  Piece piece[kKeyBlock];
};

// Whether each frame has an accumulator, as its weight is known last.
inline bool is_split(const FrameArgs& a) {
  return a.delta && (a.stat == FrameStat::row_max || a.stat == FrameStat::frame_max);
}

// Where each array of a thread's scratch begins (in floats).
struct FramesPlan {
  bool split;         // whether frames have accumulators
  bool frame_states;  // whether frames have states
  int64_t padded_dim, panels, states, accumulators;
  int64_t queries, keys, values, cells, references, maxima, max, sum, sums;
  int64_t size = 0;

  explicit FramesPlan(const FrameArgs& a)
      : split(is_split(a)),
        frame_states(split || a.map_sums),
        padded_dim(round_up(a.head_dim, kLanes)),
        panels(divide_up(a.queries_per_block, kPanelQueries)),
        states(1 + (frame_states ? a.keys.frames + 1 : 0)),
        accumulators(split ? a.keys.frames + 1 : 1) {
    queries = take(panels * kPanelQueries * a.head_dim);
    keys = take(kKeyBlock * a.head_dim);
    values = take(kKeyBlock * padded_dim);
    cells = take(kKeyBlock * kPanelQueries);
    references = take(kKeyBlock * kPanelQueries);
    maxima = take(kKeyBlock * kPanelQueries);
    max = take(panels * states * kPanelQueries);
    sum = take(panels * states * kPanelQueries);
    sums = take(accumulators * panels * kPanelQueries * padded_dim);
  }

  int64_t take(int64_t floats) {
    const int64_t start = size;
    size += round_up(floats, 16);  // a cache line
    return start;
  }
};

// Where a chunk's products with V are added to a panel's accumulator, rows of which are scaled
// before, by what the maximum has risen.
struct Accumulator {
  float* sums;
  int64_t stride;
  const float* factor;
  int64_t rows;
  bool is_first;

  Accumulator tile_at(int64_t row, int64_t column) const {
    return {sums + row * stride + column, stride, factor + row, rows - row, is_first};
  }
  template <bool PARTIAL>
  VSTAR_INLINE void put(int r, int column, Vec y, int) const {
    float* p = sums + r * stride + column;
    if (!is_first) y = fma(load(p), broadcast(factor + r), y);
    store(p, y);
  }
};

// Sets cells to 2^(cells - reference), and `sum` to their sums over the keys, at most kKeyBlock.
template <int VECTORS>
VSTAR_STAGE void exponentiate_keys(int64_t keys, const float* reference, float* cells,
                                   float* sum) {
  Vec total[VECTORS], m[VECTORS];
  for (int c = 0; c < VECTORS; ++c) {
    total[c] = zero();
    m[c] = load(reference + c * kLanes);
  }
  for (int64_t j = 0; j < keys; ++j) {
    for (int c = 0; c < VECTORS; ++c, cells += kLanes) {
      const Vec p = exp2_nonpositive(sub(load(cells), m[c]));
      total[c] = add(total[c], p);
      store(cells, p);
    }
  }
  for (int c = 0; c < VECTORS; ++c) store(sum + c * kLanes, total[c]);
}

// Returns x, and 0 where it is -inf: the maximum of nothing.
inline Vec finite_reference(Vec x) {
  return select_equal(x, broadcast(-kInfinity), zero(), x);
}

// Sets out = sum_g coefficient[g * coefficient_stride] * sums[g * sums_stride], over the frames
// whose coefficient is not zero.
template <typename T>
VSTAR_STAGE void merge_row(int64_t frames, const float* coefficient, int64_t coefficient_stride,
                           const float* sums, int64_t sums_stride, int64_t head_dim, T* out) {
  constexpr int kVectors = 4;
  for (int64_t d = 0; d < head_dim; d += kVectors * kLanes) {
    const int vectors =
        static_cast<int>(min64(kVectors, divide_up(head_dim - d, kLanes)));
    Vec y[kVectors];
    for (int c = 0; c < kVectors; ++c) y[c] = zero();
    for (int64_t g = 0; g < frames; ++g) {
      const float w = coefficient[g * coefficient_stride];
      if (w == 0.0f) continue;
      const float* row = sums + g * sums_stride + d;
      if (vectors == kVectors) {
        unrolled<kVectors>([&](auto c) VSTAR_INLINE {
          y[c] = fma(broadcast(w), load(row + c * kLanes), y[c]);
        });
      } else {
        for (int c = 0; c < vectors; ++c) y[c] = fma(broadcast(w), load(row + c * kLanes), y[c]);
      }
    }
    for (int c = 0; c < vectors; ++c) {
      const int64_t rest = head_dim - d - c * kLanes;
      if (rest >= kLanes) {
        store(out + d + c * kLanes, y[c]);
      } else {
        store_partial(out + d + c * kLanes, y[c], static_cast<int>(rest));
      }
    }
  }
}

// Computes the output of one block of queries.
template <typename T, typename Unit>
class FrameBlock {
 public:
  FrameBlock(const FrameArgs& args, const FramesPlan& plan, int64_t item, float* scratch)
      : a_(args), plan_(plan), scratch_(scratch) {
    const int64_t blocks = divide_up(args.queries.tokens, args.queries_per_block);
    block_ = item % blocks;
    batch_ = item / blocks / args.heads;
    head_ = item / blocks % args.heads;
    rows_ = {block_ * args.queries_per_block,
             min64((block_ + 1) * args.queries_per_block, args.queries.tokens)};
    headroom_ = 0;
    while ((int64_t{1} << headroom_) < args.keys.tokens) ++headroom_;
  }

  void compute() {
    const FrameRules rules(a_, batch_, head_);
    for (int64_t first = rows_.begin; first < rows_.end; first += kPanelQueries) {
      begin_panel(panel_at(first));
    }
    // A chunk is computed when the next one is known, which is fetched meanwhile.
    Chunk chunks[2];
    Chunk *present = &chunks[0], *next = &chunks[1];
    const auto compute_present = [&] {
      if (present->keys > 0) compute_chunk(rules, *present, *next);
      Chunk* const done = present;
      present = next;
      next = done;
      next->pieces = next->keys = 0;
    };
    for (int64_t frame = 0; frame <= a_.keys.frames; ++frame) {
      Rows keys = rules.visible_to_any(rows_, frame, rules.keys_of(frame));
      while (!keys.is_empty()) {
        const int64_t count = chunk_keys(keys.end - keys.begin);
        if (next->keys + count > kKeyBlock) compute_present();
        next->piece[next->pieces++] = {frame, keys.begin, next->keys,
                                       next->keys + static_cast<int>(count)};
        next->keys += static_cast<int>(count);
        keys.begin += count;
      }
    }
    compute_present();
    compute_present();
    if (a_.map_sums) clear_map_rows();
    for (int64_t first = rows_.begin; first < rows_.end; first += kPanelQueries) {
      finish_panel(rules, panel_at(first));
    }
  }

 private:
  struct QueryPanel {
    Rows rows;
    int vectors;
    float* packed_queries;
    float* max;   // [state][lane]
    float* sum;   // [state][lane]
    float* sums;  // of accumulator 0: [lane][padded_dim]

    int lanes() const { return vectors * kLanes; }
    int count() const { return static_cast<int>(rows.end - rows.begin); }
  };

  QueryPanel panel_at(int64_t first) const {
    const int64_t index = (first - rows_.begin) / kPanelQueries;
    const Rows rows = {first, min64(first + kPanelQueries, rows_.end)};
    return {rows,
            rows.end - rows.begin > kLanes ? 2 : 1,
            scratch_ + plan_.queries + index * kPanelQueries * a_.head_dim,
            scratch_ + plan_.max + index * plan_.states * kPanelQueries,
            scratch_ + plan_.sum + index * plan_.states * kPanelQueries,
            scratch_ + plan_.sums + index * kPanelQueries * plan_.padded_dim};
  }
  // Returns the place of a lane's query; the lanes behind the last query do as that one.
  static int64_t row_of(const QueryPanel& panel, int lane) {
    return min64(panel.rows.begin + lane, panel.rows.end - 1);
  }
  int64_t accumulator_stride() const {
    return plan_.panels * kPanelQueries * plan_.padded_dim;
  }
  int64_t units() const { return a_.head_dim / UnitSource<T, Unit>::kElements; }

  // Returns how many of so many keys of a frame the next chunk takes: long frames are cut evenly.
  static int64_t chunk_keys(int64_t keys) {
    return min64(keys, round_up(divide_up(keys, divide_up(keys, kKeyBlock)), kLogitsKeys));
  }

  const T* row(const void* tensor, const Strides& s, int64_t head, int64_t token) const {
    return static_cast<const T*>(tensor) + batch_ * s.batch + head * s.head + token * s.frame;
  }

  void begin_panel(const QueryPanel& panel) const {
    pack_queries<typename UnitSource<T, Unit>::Type>(
        [&](int64_t r) {
          return row(a_.query, a_.query_strides, head_, a_.queries.order[panel.rows.begin + r]);
        },
        panel.count(), panel.lanes(), units(), panel.packed_queries);
    for (int64_t i = 0; i < plan_.states * panel.lanes(); ++i) {
      panel.max[i] = -kInfinity;
      panel.sum[i] = 0.0f;
    }
  }

  // Computes what a chunk adds to all panels, and fetches the next one's rows.
  void compute_chunk(const FrameRules& rules, const Chunk& chunk, const Chunk& next) {
    pack_keys(chunk);
    const int64_t steps = divide_up(chunk.keys, kLogitsKeys) + column_tiles(plan_.padded_dim);
    fetch_ = {&next, next.keys / (steps * plan_.panels) + 1, 0, 0};
    for (int64_t first = rows_.begin; first < rows_.end; first += kPanelQueries) {
      add_chunk(rules, chunk, panel_at(first));
    }
  }

  // Fetches some more rows of the next chunk, between the microkernels' calls: a burst of fetches
  // would overflow the processor's miss buffers and be dropped.
  void fetch_some() {
    const int64_t head = head_ / (a_.heads / a_.key_heads);
    for (int64_t left = fetch_.keys_per_step; left > 0; --left) {
      if (fetch_.piece == fetch_.chunk->pieces) return;
      const Piece& piece = fetch_.chunk->piece[fetch_.piece];
      const int64_t token = a_.keys.order[a_.keys.begin[piece.frame] + piece.place + fetch_.key];
      fetch_row(row(a_.key, a_.key_strides, head, token));
      fetch_row(row(a_.value, a_.value_strides, head, token));
      if (++fetch_.key == piece.end - piece.begin) {
        fetch_.key = 0;
        ++fetch_.piece;
      }
    }
  }
  void fetch_row(const T* row) const {
    constexpr int64_t kLineElements = 64 / sizeof(T);
    for (int64_t d = 0; d < a_.head_dim; d += kLineElements) prefetch(row + d);
  }

  void pack_keys(const Chunk& chunk) const {
    using Source = typename UnitSource<T, Unit>::Type;
    const int64_t head = head_ / (a_.heads / a_.key_heads);
    float* keys = scratch_ + plan_.keys;
    float* values = scratch_ + plan_.values;
    for (int k = 0; k < chunk.pieces; ++k) {
      const Piece& piece = chunk.piece[k];
      const int32_t* order = a_.keys.order + a_.keys.begin[piece.frame] + piece.place;
      const int64_t count = piece.end - piece.begin;
      for (int64_t i = 0, n; i < count; i += n) {
        for (n = 1; i + n < count && order[i + n] == order[i] + n;) ++n;
        pack_rows<Source>(row(a_.key, a_.key_strides, head, order[i]), a_.key_strides.frame, n,
                          units(), keys);
        pack_padded_rows(row(a_.value, a_.value_strides, head, order[i]), a_.value_strides.frame,
                         n, a_.head_dim, values);
        keys += n * units();
        values += n * plan_.padded_dim;
      }
    }
  }

  // Adds a chunk to one panel's states and accumulators.
  void add_chunk(const FrameRules& rules, const Chunk& chunk, const QueryPanel& panel) {
    bool is_visible = false;
    for (int k = 0; k < chunk.pieces && !is_visible; ++k) {
      const Piece& piece = chunk.piece[k];
      const int64_t end = piece.place + piece.end - piece.begin;
      const Rows seen = rules.visible_to_any(panel.rows, piece.frame, end);
      is_visible = max64(seen.begin, piece.place) < seen.end;
    }
    if (!is_visible) return;

    float* cells = scratch_ + plan_.cells;
    float* maxima = scratch_ + plan_.maxima;
    float* constants = scratch_ + plan_.references;
    const int lanes = panel.lanes();
    for (int i = 0; i < lanes; ++i) maxima[i] = -kInfinity;
    const auto* keys = reinterpret_cast<const Unit*>(scratch_ + plan_.keys);
    with_vectors(panel.vectors, [&](auto vectors) {
      for (int j = 0; j < chunk.keys; j += kLogitsKeys) {
        fetch_some();
        logits_of_keys<vectors>(keys + j * units(), units(),
                                static_cast<int>(min64(kLogitsKeys, chunk.keys - j)),
                                panel.packed_queries, units(), a_.scale * kLog2E,
                                cells + j * lanes, maxima);
      }
    });
    for (int k = 0; k < chunk.pieces; ++k) {
      apply_rules(rules, chunk.piece[k], panel, chunk.pieces > 1, cells, constants + k * lanes,
                  maxima + k * lanes);
    }
    if (!plan_.split) {
      add_to_state(chunk.piece, chunk.pieces, panel, 0, 0);
      return;
    }
    for (int k = 0; k < chunk.pieces; ++k) {
      add_to_state(chunk.piece + k, 1, panel, k, chunk.piece[k].frame + 1);
    }
  }

  // Sets a piece's constants: what is added to its logits as far as it is known, and -inf for
  // queries that it is masked for. Changes single logits where the rule does, and then, or where
  // the maxima are not its own yet, sets its maxima.
  void apply_rules(const FrameRules& rules, const Piece& piece, const QueryPanel& panel,
                   bool sets_max, float* cells, float* constants, float* maxima) const {
    bool has_factor = false, has_band = false;
    LaneRules lane;
    const float first = static_cast<float>(piece.place);
    const float end = static_cast<float>(piece.place + piece.end - piece.begin);
    const int lanes = panel.lanes();
    for (int i = 0; i < lanes;) {
      const int64_t f = frame_of(a_.queries, row_of(panel, i));
      const int64_t begin = a_.queries.begin[f];
      const int64_t same = a_.queries.begin[f + 1] < panel.rows.end
                               ? a_.queries.begin[f + 1] - panel.rows.begin
                               : lanes;
      const bool is_free = rules.is_text_query(f) || rules.is_text_key(piece.frame);
      const float offset = is_free ? 0.0f : rules.offset(f, piece.frame) * kLog2E;
      const float delta = is_free || plan_.split ? 0.0f : rules.delta(f, piece.frame);
      for (; i < same; ++i) {
        constants[i] = plan_.split && offset != -kInfinity ? 0.0f : offset;
        lane.low[i] = lane.span_low[i] = -kInfinity;
        lane.high[i] = lane.span_high[i] = kInfinity;
        lane.positive[i] = lane.negative[i] = 1.0f;
        if (is_free) continue;
        const int64_t place = row_of(panel, i) - begin;
        if (delta != 0.0f) constants[i] += given_stat(place + begin) * delta;
        if (a_.band) {
          lane.low[i] = static_cast<float>(place + rules.band(0, f, piece.frame));
          lane.high[i] = static_cast<float>(place + rules.band(1, f, piece.frame) + 1);
          has_band = has_band || lane.low[i] > first || lane.high[i] < end;
        }
        if (a_.factor) {
          lane.positive[i] = rules.factor(0, f, piece.frame);
          lane.negative[i] = rules.factor(1, f, piece.frame);
          if (a_.factor_span) {
            lane.span_low[i] = static_cast<float>(place + rules.factor_span(0, f, piece.frame));
            lane.span_high[i] =
                static_cast<float>(place + rules.factor_span(1, f, piece.frame) + 1);
          }
          has_factor = has_factor || ((lane.positive[i] != 1.0f || lane.negative[i] != 1.0f) &&
                                      lane.span_low[i] < end && lane.span_high[i] > first);
        }
      }
    }
    if (!sets_max && !has_factor && !has_band) return;
    with_vectors(panel.vectors, [&](auto vectors) {
      const auto apply = has_factor ? has_band ? apply_lane_rules<vectors, true, true>
                                               : apply_lane_rules<vectors, true, false>
                         : has_band ? apply_lane_rules<vectors, false, true>
                                    : apply_lane_rules<vectors, false, false>;
      apply(piece.end - piece.begin, piece.place, lane, cells + piece.begin * lanes, maxima);
    });
  }

  // Returns the statistic of a row, times log2 e, that is known beforehand.
  float given_stat(int64_t row) const {
    if (a_.stat != FrameStat::tensor) return kLog2E;
    const Strides& s = a_.stat_strides;
    const float stat = a_.stat_tensor[batch_ * s.batch + a_.queries.order[row] * s.frame +
                                      head_ * s.head];
    return a_.clamp_negative && stat < 0.0f ? 0.0f : stat * kLog2E;
  }

  // Turns pieces' logits into weights, and adds them to one state and its accumulator. `first` is
  // the first piece's number in the chunk.
  void add_to_state(const Piece* pieces, int count, const QueryPanel& panel, int first,
                    int64_t state) {
    float* cells = scratch_ + plan_.cells;
    const int lanes = panel.lanes();
    float* max_of_state = panel.max + state * lanes;
    float* sum_of_state = panel.sum + state * lanes;
    float* references = scratch_ + plan_.references + first * lanes;
    const float* maxima = scratch_ + plan_.maxima + first * lanes;
    float risen[kPanelQueries], sum_of_piece[kPanelQueries];
    const bool is_first = is_untouched(panel, state);
    for (int c = 0; c < lanes; c += kLanes) {
      const Vec old_max = load(max_of_state + c);
      Vec new_max = old_max;
      for (int k = 0; k < count; ++k) {
        new_max = max(add(load(maxima + k * lanes + c), load(references + k * lanes + c)), new_max);
      }
      store(max_of_state + c, new_max);
      const Vec reference = finite_reference(new_max);
      const Vec factor = exp2_nonpositive(sub(old_max, reference));
      store(risen + c, factor);
      store(sum_of_state + c, mul(load(sum_of_state + c), factor));
      const Vec raised = add(reference, broadcast(static_cast<float>(headroom_)));
      for (int k = 0; k < count; ++k) {
        float* r = references + k * lanes + c;
        store(r, sub(raised, load(r)));
      }
    }
    for (int k = 0; k < count; ++k) {
      with_vectors(panel.vectors, [&](auto vectors) {
        exponentiate_keys<vectors>(pieces[k].end - pieces[k].begin, references + k * lanes,
                                   cells + pieces[k].begin * lanes, sum_of_piece);
      });
      for (int c = 0; c < lanes; c += kLanes) {
        store(sum_of_state + c, add(load(sum_of_state + c), load(sum_of_piece + c)));
      }
      if (plan_.frame_states && !plan_.split) {
        add_to_frame_sum(panel, pieces[k].frame + 1, max_of_state, sum_of_piece);
      }
    }
    const int64_t accumulator = plan_.split ? state - 1 : 0;
    const Accumulator to = {panel.sums + accumulator * accumulator_stride(), plan_.padded_dim,
                            risen, panel.count(), is_first};
    product<Over::keys>(cells + pieces[0].begin * lanes, lanes,
                        scratch_ + plan_.values + pieces[0].begin * plan_.padded_dim,
                        plan_.padded_dim, pieces[count - 1].end - pieces[0].begin,
                        plan_.padded_dim, to, [this] { fetch_some(); });
  }

  // Returns whether nothing was added to a state yet.
  bool is_untouched(const QueryPanel& panel, int64_t state) const {
    for (int i = 0; i < panel.lanes(); ++i) {
      if (panel.sum[state * panel.lanes() + i] != 0.0f ||
          panel.max[state * panel.lanes() + i] != -kInfinity) {
        return false;
      }
    }
    return true;
  }

  // Adds a piece's sums, relative to the maxima so far, to its frame's, which are relative to the
  // maxima when they were added to last.
  void add_to_frame_sum(const QueryPanel& panel, int64_t state, const float* max_so_far,
                        const float* sum_of_piece) const {
    const int lanes = panel.lanes();
    for (int c = 0; c < lanes; c += kLanes) {
      float* m = panel.max + state * lanes + c;
      float* s = panel.sum + state * lanes + c;
      const Vec reference = finite_reference(load(max_so_far + c));
      const Vec factor = exp2_nonpositive(sub(load(m), reference));
      store(s, fma(load(s), factor, load(sum_of_piece + c)));
      store(m, load(max_so_far + c));
    }
  }

  // Writes a panel's output, and adds to the map.
  void finish_panel(const FrameRules& rules, const QueryPanel& panel) const {
    const int lanes = panel.lanes();
    if (plan_.split) {
      set_frame_weights(rules, panel);
    } else {
      // The inverse of the sum, in its place.
      for (int c = 0; c < lanes; c += kLanes) store(panel.sum + c, inverse(load(panel.sum + c)));
    }
    if (a_.map_sums) add_to_map(panel);
    const float* coefficients = plan_.split ? panel.max + lanes : panel.sum;
    for (int i = 0; i < panel.count(); ++i) {
      T* out = static_cast<T*>(a_.out) + batch_ * a_.out_strides.batch +
               head_ * a_.out_strides.head +
               a_.queries.order[panel.rows.begin + i] * a_.out_strides.frame;
      merge_row(plan_.accumulators, coefficients + i, lanes, panel.sums + i * plan_.padded_dim,
                accumulator_stride(), a_.head_dim, out);
    }
  }

  // Returns 1 / x, and 0 for 0.
  static Vec inverse(Vec x) { return select_equal(x, zero(), zero(), div(broadcast(1.0f), x)); }

  // Sets the frames' maxima to what their sums are multiplied by, now that the statistic is known.
  void set_frame_weights(const FrameRules& rules, const QueryPanel& panel) const {
    const int lanes = panel.lanes();
    float stat[kPanelQueries];
    compute_stat(rules, panel, stat);
    int64_t frames[kPanelQueries];  // of the rows
    for (int i = 0; i < lanes; ++i) frames[i] = frame_of(a_.queries, row_of(panel, i));
    float* most = panel.max;  // state 0 is free
    for (int64_t g = 0; g <= a_.keys.frames; ++g) {
      float* m = panel.max + (g + 1) * lanes;
      for (int i = 0; i < lanes; ++i) {
        const int64_t f = frames[i];
        const bool is_free = rules.is_text_query(f) || rules.is_text_key(g);
        if (is_free || m[i] == -kInfinity) continue;
        m[i] += stat[i] * rules.delta(f, g) + rules.offset(f, g) * kLog2E;
      }
      for (int c = 0; c < lanes; c += kLanes) {
        store(most + c, max(load(m + c), load(most + c)));
      }
    }
    float* total = panel.sum;
    for (int64_t g = 0; g <= a_.keys.frames; ++g) {
      float* m = panel.max + (g + 1) * lanes;
      for (int c = 0; c < lanes; c += kLanes) {
        const Vec weight = exp2_nonpositive(sub(load(m + c), finite_reference(load(most + c))));
        store(m + c, weight);
        store(total + c, fma(weight, load(panel.sum + (g + 1) * lanes + c), load(total + c)));
      }
    }
    for (int64_t g = 0; g <= a_.keys.frames; ++g) {
      float* m = panel.max + (g + 1) * lanes;
      for (int c = 0; c < lanes; c += kLanes) {
        store(m + c, mul(load(m + c), inverse(load(total + c))));
      }
    }
  }

  // Sets `stat` to the rows' statistics, times log2 e.
  void compute_stat(const FrameRules& rules, const QueryPanel& panel, float* stat) const {
    const int lanes = panel.lanes();
    for (int c = 0; c < lanes; c += kLanes) store(stat + c, broadcast(-kInfinity));
    for (int64_t g = 0; g < a_.keys.frames; ++g) {
      for (int c = 0; c < lanes; c += kLanes) {
        store(stat + c, max(load(panel.max + (g + 1) * lanes + c), load(stat + c)));
      }
    }
    if (a_.stat == FrameStat::frame_max) {
      // max_g (l_g / P_g) 2^(m_g - m), the maximum over frames in the numbers' own domain.
      float best[kPanelQueries], counts[kPanelQueries];
      for (int i = 0; i < lanes; ++i) best[i] = 0.0f;
      for (int64_t g = 0; g < a_.keys.frames; ++g) {
        count_keys(rules, panel, g, counts);
        for (int c = 0; c < lanes; c += kLanes) {
          const Vec below = sub(load(panel.max + (g + 1) * lanes + c),
                                finite_reference(load(stat + c)));
          const Vec mean = div(load(panel.sum + (g + 1) * lanes + c), load(counts + c));
          store(best + c, max(mul(mean, exp2_nonpositive(below)), load(best + c)));
        }
      }
      for (int i = 0; i < lanes; ++i) {
        if (stat[i] != -kInfinity) {
          stat[i] += static_cast<float>(headroom_) + __builtin_log2f(best[i]);
        }
      }
    }
    for (int i = 0; i < lanes; ++i) {
      if (stat[i] == -kInfinity || (a_.clamp_negative && stat[i] < 0.0f)) stat[i] = 0.0f;
    }
  }

  // Sets how many keys of a frame each row sees, or 1 if none.
  void count_keys(const FrameRules& rules, const QueryPanel& panel, int64_t key_frame,
                  float* counts) const {
    const int64_t count = rules.keys_of(key_frame);
    for (int i = 0; i < panel.lanes(); ++i) {
      counts[i] = static_cast<float>(max64(count, 1));
      if (!a_.band) continue;
      const int64_t r = row_of(panel, i), f = frame_of(a_.queries, r), place = r - a_.queries.begin[f];
      const Rows seen = rules.visible(f, place, place, key_frame, count);
      counts[i] = static_cast<float>(max64(seen.end - seen.begin, 1));
    }
  }

  float* map_rows() const {
    const int64_t sequence = batch_ * a_.heads + head_;
    return a_.map_sums + (sequence * a_.map_rows_per_head + a_.map_rows[block_]) * map_columns();
  }
  int64_t map_columns() const { return a_.keys.frames + 1; }

  void clear_map_rows() const {
    const int64_t count = a_.map_rows[block_ + 1] - a_.map_rows[block_];
    float* rows = map_rows();
    for (int64_t i = 0; i < count * map_columns(); ++i) rows[i] = 0.0f;
  }

  // Adds the panel's mass on each frame of keys to its query frames' rows of the map.
  void add_to_map(const QueryPanel& panel) const {
    const int lanes = panel.lanes();
    float mass[kPanelQueries];
    const int64_t first_frame = frame_of(a_.queries, rows_.begin);
    for (int64_t g = 0; g <= a_.keys.frames; ++g) {
      const float* m = panel.max + (g + 1) * lanes;
      const float* s = panel.sum + (g + 1) * lanes;
      for (int c = 0; c < lanes; c += kLanes) {
        Vec weight = load(m + c);
        if (!plan_.split) {
          weight = exp2_nonpositive(sub(weight, finite_reference(load(panel.max + c))));
          weight = mul(weight, load(panel.sum + c));
        }
        store(mass + c, mul(weight, load(s + c)));
      }
      for (int i = 0; i < panel.count();) {
        const int64_t f = frame_of(a_.queries, panel.rows.begin + i);
        if (f == a_.queries.frames) break;
        const int64_t end = min64(a_.queries.begin[f + 1], panel.rows.end) - panel.rows.begin;
        float total = 0.0f;
        for (; i < end; ++i) total += mass[i];
        map_rows()[(f - first_frame) * map_columns() + g] += total;
      }
    }
  }

  // Which rows of the next chunk are fetched next.
  struct Fetch {
    const Chunk* chunk;
    int64_t keys_per_step;
    int piece, key;
  };

  const FrameArgs& a_;
  const FramesPlan& plan_;
  float* scratch_;
  Fetch fetch_ = {};
  int64_t block_, batch_, head_;
  Rows rows_;
  int headroom_;  // log2 of the number of keys, rounded up
};

inline int64_t frames_scratch(const FrameArgs& a) { return FramesPlan(a).size; }

template <typename T, typename Unit>
void frames_forward_typed(Types<T, Unit>, const FrameArgs& a, int64_t item, float* scratch) {
  const FramesPlan plan(a);
  FrameBlock<T, Unit>(a, plan, item, scratch).compute();
}

inline void frames_forward(const FrameArgs& a, int64_t item, float* scratch) {
  with_types(a.type, a.head_dim,
             [&](auto types) { frames_forward_typed(types, a, item, scratch); });
}

}  // namespace vstar::VSTAR_ISA
