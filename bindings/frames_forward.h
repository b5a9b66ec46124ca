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
#pragma once

#include "frames_weights.h"
#include "packing.h"

namespace vstar::VSTAR_ISA {

// At most kKeyBlock keys, in pieces.
struct Chunk {
  int pieces = 0;
  int64_t keys = 0;
  Piece piece[kKeyBlock];
};

// Where each array of a thread's scratch begins (in floats).
struct FramesPlan {
  bool split;         // whether frames have accumulators, as their weights are known last
  bool frame_states;  // whether frames have states
  int64_t padded_dim, panels, states, accumulators;
  int64_t queries, keys, values, cells, constants, maxima, max, sum, sums;
  int64_t size = 0;

  explicit FramesPlan(const FrameArgs& a)
      : split(FrameWeights::is_from_logits(a)),
        frame_states(split || a.map_sums),
        padded_dim(round_up(a.head_dim, kLanes)),
        panels(divide_up(a.queries_per_block, kPanelQueries)),
        states(1 + (frame_states ? a.keys.frames + 1 : 0)),
        accumulators(split ? a.keys.frames + 1 : 1) {
    queries = take(panels * kPanelQueries * a.head_dim);
    keys = take(kKeyBlock * a.head_dim);
    values = take(kKeyBlock * padded_dim);
    cells = take(kKeyBlock * kPanelQueries);
    constants = take(kKeyBlock * kPanelQueries);
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
  template <bool PARTIAL, int COLUMNS>
  VSTAR_INLINE void put(Vec (&sum)[kProductRows][COLUMNS], int) const {
    const Accumulator here = *this;  // in registers: the stores could be to the original
    if (!here.is_first) {
      unrolled<kProductRows>([&](auto r) VSTAR_INLINE {
        const Vec risen = broadcast(here.factor + r);
        unrolled<COLUMNS>([&](auto c) VSTAR_INLINE {
          sum[r][c] = fma(load(here.sums + r * here.stride + c * kLanes), risen, sum[r][c]);
        });
      });
    }
    unrolled<kProductRows, COLUMNS>([&](auto r, auto c) VSTAR_INLINE {
      store(here.sums + r * here.stride + c * kLanes, sum[r][c]);
    });
  }
};

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
      : a_(args),
        plan_(plan),
        scratch_(scratch),
        block_(item % blocks(args)),
        batch_(item / blocks(args) / args.heads),
        head_(item / blocks(args) % args.heads),
        rows_{block_ * args.queries_per_block,
              min64((block_ + 1) * args.queries_per_block, args.queries.tokens)},
        weights_(args, batch_, head_, plan.split) {}

  void compute() {
    const FrameRules& rules = weights_.rules();
    for_each_panel([&](const FramePanel& panel, int64_t) {
      pack_queries<typename UnitSource<T, Unit>::Type>(
          [&](int64_t r) {
            return row(a_.query, a_.query_strides, head_, a_.queries.order[panel.rows.begin + r]);
          },
          panel.count(), panel.lanes(), units(), panel.packed_queries);
      FrameWeights::clear(panel, plan_.states);
    });
    // A chunk is computed when the next one is known, which is fetched meanwhile.
    Chunk chunks[2];
    Chunk *present = &chunks[0], *next = &chunks[1];
    const auto compute_present = [&] {
      if (present->keys > 0) compute_chunk(*present, *next);
      Chunk* const done = present;
      present = next;
      next = done;
      next->pieces = 0;
      next->keys = 0;
    };
    for (int64_t frame = 0; frame <= a_.keys.frames; ++frame) {
      Rows keys = rules.visible_to_any(rows_, frame, rules.keys_of(frame));
      while (!keys.is_empty()) {
        const int64_t count = chunk_keys(keys.end - keys.begin);
        if (next->keys + count > kKeyBlock) compute_present();
        next->piece[next->pieces++] = {frame, keys.begin, next->keys, next->keys + count};
        next->keys += count;
        keys.begin += count;
      }
    }
    compute_present();
    compute_present();
    if (a_.map_sums) clear_map_rows();
    for_each_panel([&](const FramePanel& panel, int64_t index) { finish_panel(panel, index); });
  }

 private:
  static int64_t blocks(const FrameArgs& a) {
    return divide_up(a.queries.tokens, a.queries_per_block);
  }

  // Calls body(panel, its number in the block).
  template <typename Body>
  void for_each_panel(const Body& body) const {
    int64_t index = 0;
    for (int64_t first = rows_.begin; first < rows_.end; first += kPanelQueries, ++index) {
      const int64_t states = index * plan_.states * kPanelQueries;
      body(FramePanel({first, min64(first + kPanelQueries, rows_.end)},
                      scratch_ + plan_.queries + index * kPanelQueries * a_.head_dim,
                      scratch_ + plan_.max + states, scratch_ + plan_.sum + states),
           index);
    }
  }

  // Returns a panel's sums of an accumulator, [lane][padded_dim].
  float* sums(int64_t panel, int64_t accumulator) const {
    return scratch_ + plan_.sums +
           (accumulator * plan_.panels + panel) * kPanelQueries * plan_.padded_dim;
  }
  int64_t units() const { return a_.head_dim / UnitSource<T, Unit>::kElements; }

  // Returns how many of so many keys of a frame the next chunk takes: long frames are cut evenly,
  // in whole tiles of logits where a chunk has room for them.
  static int64_t chunk_keys(int64_t keys) {
    const int64_t even = divide_up(keys, divide_up(keys, kKeyBlock));
    return min64(keys, min64(kKeyBlock, round_up(even, kLogitsKeys)));
  }

  const T* row(const void* tensor, const Strides& s, int64_t head, int64_t token) const {
    return static_cast<const T*>(tensor) + batch_ * s.batch + head * s.head + token * s.frame;
  }
  int64_t key_head() const { return head_ / (a_.heads / a_.key_heads); }

  // Computes what a chunk adds to all panels, and fetches the next one's rows.
  void compute_chunk(const Chunk& chunk, const Chunk& next) {
    pack_keys(chunk);
    const int64_t steps =
        divide_up(chunk.keys, kLogitsKeys) + product_tiles(kPanelQueries, plan_.padded_dim);
    fetch_ = {&next, next.keys / (steps * plan_.panels) + 1, 0, 0};
    for_each_panel(
        [&](const FramePanel& panel, int64_t index) { add_chunk(chunk, panel, index); });
  }

  // Fetches some more rows of the next chunk, between the microkernels' calls: a burst of fetches
  // would overflow the processor's miss buffers and be dropped.
  void fetch_some() {
    for (int64_t left = fetch_.keys_per_step; left > 0; --left) {
      if (fetch_.piece == fetch_.chunk->pieces) return;
      const Piece& piece = fetch_.chunk->piece[fetch_.piece];
      const int64_t token = a_.keys.order[a_.keys.begin[piece.frame] + piece.place + fetch_.key];
      fetch_row(row(a_.key, a_.key_strides, key_head(), token));
      fetch_row(row(a_.value, a_.value_strides, key_head(), token));
      if (++fetch_.key == piece.keys()) {
        fetch_.key = 0;
        ++fetch_.piece;
      }
    }
  }
  void fetch_row(const T* row) const {
    constexpr int64_t kLineElements = 64 / sizeof(T);
    for (int64_t d = 0; d < a_.head_dim; d += kLineElements) __builtin_prefetch(row + d);
  }

  // Packs a chunk's rows. Keys that follow each other are used where they lie if they can be: each
  // panel reads them once, values once for every few queries.
  void pack_keys(const Chunk& chunk) {
    using Source = UnitSource<T, Unit>;
    const Piece& first = chunk.piece[0];
    const int32_t* tokens = a_.keys.order + a_.keys.begin[first.frame] + first.place;
    const int64_t stride = a_.key_strides.frame;
    const bool in_place = Source::kInPlace && chunk.pieces == 1 &&
                          stride % Source::kElements == 0 &&
                          tokens[chunk.keys - 1] == tokens[0] + chunk.keys - 1;
    float* keys = scratch_ + plan_.keys;
    float* values = scratch_ + plan_.values;
    keys_ = reinterpret_cast<const Unit*>(keys);
    key_stride_ = units();
    if (in_place) {
      keys_ = reinterpret_cast<const Unit*>(row(a_.key, a_.key_strides, key_head(), tokens[0]));
      key_stride_ = stride / Source::kElements;
    }
    for (int k = 0; k < chunk.pieces; ++k) {
      const Piece& piece = chunk.piece[k];
      const int32_t* order = a_.keys.order + a_.keys.begin[piece.frame] + piece.place;
      for (int64_t i = 0, n; i < piece.keys(); i += n) {
        for (n = 1; i + n < piece.keys() && order[i + n] == order[i] + n;) ++n;
        if (!in_place) {
          pack_rows<typename Source::Type>(row(a_.key, a_.key_strides, key_head(), order[i]),
                                           stride, n, units(), keys);
        }
        pack_padded_rows(row(a_.value, a_.value_strides, key_head(), order[i]),
                         a_.value_strides.frame, n, a_.head_dim, values);
        keys += n * units();
        values += n * plan_.padded_dim;
      }
    }
  }

  bool sees(const FramePanel& panel, const Chunk& chunk) const {
    for (int k = 0; k < chunk.pieces; ++k) {
      const Piece& piece = chunk.piece[k];
      const Rows seen = weights_.rules().visible_to_any(panel.rows, piece.frame,
                                                        piece.place + piece.keys());
      if (max64(seen.begin, piece.place) < seen.end) return true;
    }
    return false;
  }

  // Adds a chunk to one panel's states and accumulators.
  void add_chunk(const Chunk& chunk, const FramePanel& panel, int64_t index) {
    if (!sees(panel, chunk)) return;
    float* cells = scratch_ + plan_.cells;
    float* maxima = scratch_ + plan_.maxima;
    float* constants = scratch_ + plan_.constants;
    const int lanes = panel.lanes();
    for (int i = 0; i < lanes; ++i) maxima[i] = -kInfinity;
    with_vectors(panel.vectors, [&](auto vectors) {
      for (int64_t j = 0; j < chunk.keys; j += kLogitsKeys) {
        fetch_some();
        logits_of_keys<vectors>(keys_ + j * key_stride_, key_stride_,
                                static_cast<int>(min64(kLogitsKeys, chunk.keys - j)),
                                panel.packed_queries, units(), a_.scale * kLog2E,
                                cells + j * lanes, maxima);
      }
    });
    for (int k = 0; k < chunk.pieces; ++k) {
      weights_.apply_rules(chunk.piece[k], panel, chunk.pieces > 1, cells, constants + k * lanes,
                           maxima + k * lanes);
    }
    if (!plan_.split) {
      add_pieces(chunk.piece, chunk.pieces, panel, index, 0, maxima, constants);
      return;
    }
    for (int k = 0; k < chunk.pieces; ++k) {
      add_pieces(chunk.piece + k, 1, panel, index, chunk.piece[k].frame + 1, maxima + k * lanes,
                 constants + k * lanes);
    }
  }

  // Adds pieces to one state, and to its accumulator.
  void add_pieces(const Piece* pieces, int count, const FramePanel& panel, int64_t index,
                  int64_t state, const float* maxima, float* constants) {
    float* cells = scratch_ + plan_.cells;
    const bool is_first = is_untouched(panel, state);
    float risen[kPanelQueries];
    weights_.exponentiate(pieces, count, panel, state, cells, maxima, constants, risen,
                          [&](int k, const float* sums) {
                            if (plan_.frame_states && !plan_.split) {
                              FrameWeights::add_to_frame(panel, pieces[k].frame, sums);
                            }
                          });
    const int64_t begin = pieces[0].begin, keys = pieces[count - 1].end - begin;
    const Accumulator to = {sums(index, plan_.split ? state - 1 : 0), plan_.padded_dim, risen,
                            panel.count(), is_first};
    product<Over::keys>(cells + begin * panel.lanes(), panel.lanes(),
                        scratch_ + plan_.values + begin * plan_.padded_dim, plan_.padded_dim, keys,
                        plan_.padded_dim, to, [this] { fetch_some(); });
  }

  // Returns whether nothing was added to a state yet.
  static bool is_untouched(const FramePanel& panel, int64_t state) {
    for (int i = 0; i < panel.lanes(); ++i) {
      if (panel.max_of(state)[i] != -kInfinity || panel.sum_of(state)[i] != 0.0f) return false;
    }
    return true;
  }

  // Writes a panel's output, and adds to the map.
  void finish_panel(const FramePanel& panel, int64_t index) const {
    const int lanes = panel.lanes();
    if (plan_.split) {
      float stat[kPanelQueries], best_frame[kPanelQueries];
      weights_.compute_stat(panel, stat, best_frame);
      weights_.clamp(panel, stat);
      weights_.set_coefficients(panel, stat);
    } else {
      // The inverse of the sum, in its place.
      for (int c = 0; c < lanes; c += kLanes) {
        store(panel.sum + c, inverse_or_zero(load(panel.sum + c)));
      }
    }
    if (a_.map_sums) add_to_map(panel);
    const float* coefficients = plan_.split ? panel.max_of(1) : panel.sum;
    for (int i = 0; i < panel.count(); ++i) {
      T* out = static_cast<T*>(a_.out) + batch_ * a_.out_strides.batch +
               head_ * a_.out_strides.head +
               a_.queries.order[panel.rows.begin + i] * a_.out_strides.frame;
      merge_row(plan_.accumulators, coefficients + i, lanes,
                sums(index, 0) + i * plan_.padded_dim, sums(0, 1) - sums(0, 0), a_.head_dim, out);
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
  void add_to_map(const FramePanel& panel) const {
    float mass[kPanelQueries];
    const int64_t first_frame = frame_of(a_.queries, rows_.begin);
    for (int64_t g = 0; g <= a_.keys.frames; ++g) {
      for (int c = 0; c < panel.lanes(); c += kLanes) {
        Vec weight = load(panel.max_of(g + 1) + c);
        if (!plan_.split) {
          weight = exp2_nonpositive(sub(weight, finite_reference(load(panel.max + c))));
          weight = mul(weight, load(panel.sum + c));
        }
        store(mass + c, mul(weight, load(panel.sum_of(g + 1) + c)));
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
    int piece;
    int64_t key;
  };

  const FrameArgs& a_;
  const FramesPlan& plan_;
  float* scratch_;
  int64_t block_, batch_, head_;
  Rows rows_;
  FrameWeights weights_;
  Fetch fetch_ = {};
  const Unit* keys_ = nullptr;  // of the present chunk
  int64_t key_stride_ = 0;      // in units
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
