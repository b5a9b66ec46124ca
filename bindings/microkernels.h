// The stages of a panel's computation, which attention_weights.h, forward.h and backward.h put
// together: logits, bias, exponentials, products with rows. Queries lie along the lanes throughout.
#pragma once

#include "loops.h"
#include "types.h"

namespace vstar::VSTAR_ISA {

// Sums over keys are taken in blocks of this many and then added up: a long running sum would lose
// a bit of the result for every fourfold of its length. A block's rows of V also stay in the cache.
constexpr int64_t kKeyBlock = 128;

// And of those, as many one after the other. Equal terms, as the weights of a row of equal logits are,
// are rounded to the same side all the time: a running sum of 128 may miss by 40 units in the last
// place.
constexpr int64_t kSumTerms = 16;

constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kLn2 = 0.693147180559945309417f;
constexpr float kInfinity = __builtin_inff();
constexpr float kNaN = __builtin_nanf("");

// Returns 2^x for x <= 0, to float32 rounding; zero below 2^-126, NaN for NaN.
inline Vec exp2_nonpositive(Vec x) {
  x = max(broadcast(-127.0f), x);
  const Vec whole = round(x);
  const Vec f = sub(x, whole);  // in [-0.5, 0.5]
  // Minimax polynomial for the relative error with p(0) = 1: within 1.6e-8 as rounded here, a
  // quarter of a float32 rounding.
  Vec p = broadcast(1.5353362e-4f);
  p = fma(p, f, broadcast(1.33988750e-3f));
  p = fma(p, f, broadcast(9.61843692e-3f));
  p = fma(p, f, broadcast(5.55033237e-2f));
  p = fma(p, f, broadcast(2.40226477e-1f));
  p = fma(p, f, broadcast(6.93147182e-1f));
  p = fma(p, f, broadcast(1.0f));
  return scale_by_power(p, whole, x);
}

// Returns a * b + c in the unit (packing.h) that the unused pointer's type tells.
inline Vec multiply_add(const float*, Vec a, Vec b, Vec c) { return fma(a, b, c); }
#if defined(VSTAR_BFLOAT16_PAIRS)
inline Vec multiply_add(const Pair*, Vec a, Vec b, Vec c) { return dot(a, b, c); }
#endif

// Computes the logits of KEYS keys against a panel of VECTORS vectors of queries, and raises its
// maxima. Logits are scaled last: products that are equal stay so, whatever their terms, and it is
// the first of equal logits that takes the gradient through the maximum.
template <int KEYS, int VECTORS, typename Unit>
VSTAR_INLINE inline void logits_tile(const Unit* keys, int64_t key_stride, const float* queries,
                                     int64_t units, float scale, float* logits,
                                     Vec (&row_max)[VECTORS]) {
  constexpr int lanes = VECTORS * kLanes;
  Vec sum[KEYS][VECTORS];
  unrolled<KEYS, VECTORS>([&](auto k, auto c) VSTAR_INLINE { sum[k][c] = zero(); });
  for (int64_t d = 0; d < units; ++d) {
    Vec q[VECTORS];
    unrolled<VECTORS>([&](auto c) VSTAR_INLINE { q[c] = load(queries + d * lanes + c * kLanes); });
    unrolled<KEYS>([&](auto k) VSTAR_INLINE {
      const Vec key = broadcast(keys + k * key_stride + d);
      unrolled<VECTORS>(
          [&](auto c) VSTAR_INLINE { sum[k][c] = multiply_add(keys, key, q[c], sum[k][c]); });
    });
  }
  const Vec factor = broadcast(scale);
  unrolled<KEYS, VECTORS>([&](auto k, auto c) VSTAR_INLINE {
    const Vec logit = mul(sum[k][c], factor);
    row_max[c] = max(row_max[c], logit);
    store(logits + k * lanes + c * kLanes, logit);
  });
}

// Does as logits_tile for a number of keys below kLogitsKeys that is known only at run time.
template <int VECTORS, int KEYS = kLogitsKeys - 1, typename Unit>
VSTAR_INLINE inline void logits_rest(int count, const Unit* keys, int64_t key_stride,
                                     const float* queries, int64_t units, float scale,
                                     float* logits, Vec (&row_max)[VECTORS]) {
  if constexpr (KEYS > 0) {
    if (count == KEYS) {
      logits_tile<KEYS>(keys, key_stride, queries, units, scale, logits, row_max);
    } else {
      logits_rest<VECTORS, KEYS - 1>(count, keys, key_stride, queries, units, scale, logits,
                                     row_max);
    }
  }
}

// Does as logits_tile for `count` keys, at most kLogitsKeys of each of two vectors of queries, or
// twice as many of one.
template <int VECTORS, typename Unit>
VSTAR_STAGE void logits_of_keys(const Unit* keys, int64_t key_stride, int count,
                                const float* queries, int64_t units, float scale, float* logits,
                                float* row_max) {
  Vec m[VECTORS];
  for (int c = 0; c < VECTORS; ++c) m[c] = load(row_max + c * kLanes);
  // One vector of queries leaves registers for twice the keys: more products in flight.
  if (VECTORS == 1 && count == 2 * kLogitsKeys) {
    logits_tile<2 * kLogitsKeys / VECTORS>(keys, key_stride, queries, units, scale, logits, m);
  } else {
    if (count >= kLogitsKeys) {
      logits_tile<kLogitsKeys>(keys, key_stride, queries, units, scale, logits, m);
      count -= kLogitsKeys;
      keys += kLogitsKeys * key_stride;
      logits += kLogitsKeys * VECTORS * kLanes;
    }
    logits_rest<VECTORS>(count, keys, key_stride, queries, units, scale, logits, m);
  }
  for (int c = 0; c < VECTORS; ++c) store(row_max + c * kLanes, m[c]);
}

// Sets sum[i] to a sum over the keys, in blocks of them; term(sum, key, vector) adds one key to it.
template <int VECTORS, typename Term>
[[gnu::always_inline]] inline void sum_over_keys(int64_t keys, float* sum, const Term& term) {
  Vec total[VECTORS];
  for (int c = 0; c < VECTORS; ++c) total[c] = zero();
  for (int64_t start = 0; start < keys; start += kKeyBlock) {
    const int64_t end = min64(start + kKeyBlock, keys);
    Vec block[VECTORS];
    for (int c = 0; c < VECTORS; ++c) block[c] = zero();
    for (int64_t first = start; first < end; first += kSumTerms) {
      const int64_t last = min64(first + kSumTerms, end);
      Vec few[VECTORS];
      for (int c = 0; c < VECTORS; ++c) few[c] = zero();
      for (int64_t j = first; j < last; ++j) {
        for (int c = 0; c < VECTORS; ++c) few[c] = term(few[c], j, c);
      }
      for (int c = 0; c < VECTORS; ++c) block[c] = add(block[c], few[c]);
    }
    for (int c = 0; c < VECTORS; ++c) total[c] = add(total[c], block[c]);
  }
  for (int c = 0; c < VECTORS; ++c) store(sum + c * kLanes, total[c]);
}

// Adds the bias, weight[i] * delta(j, i), to the logits; `row_max` becomes the new maxima. Of the
// lanes, `query_count` hold queries: the table may end behind the last of them.
template <int VECTORS>
VSTAR_STAGE void add_bias(const float* delta, int64_t key_stride, int64_t keys, int query_count,
                          const float* weight, float* logits, float* row_max) {
  Vec m[VECTORS];
  for (int c = 0; c < VECTORS; ++c) m[c] = broadcast(-kInfinity);
  for (int c = 0; c < VECTORS; ++c) {
    const int lanes = query_count - c * kLanes;
    const Vec w = load(weight + c * kLanes);
    for (int64_t j = 0; j < keys; ++j) {
      const float* entries = delta + j * key_stride + c * kLanes;
      float* cell = logits + (j * VECTORS + c) * kLanes;
      const Vec d = lanes >= kLanes ? load(entries) : load_partial(entries, lanes);
      const Vec x = fma(w, d, load(cell));
      m[c] = max(m[c], x);
      store(cell, x);
    }
  }
  for (int c = 0; c < VECTORS; ++c) store(row_max + c * kLanes, m[c]);
}

// Sets cells to 2^(cells - reference), and `sum` to their sums over the keys.
template <int VECTORS>
VSTAR_STAGE void exponentiate(int64_t keys, const float* reference, float* cells, float* sum) {
  Vec m[VECTORS];
  for (int c = 0; c < VECTORS; ++c) m[c] = load(reference + c * kLanes);
  sum_over_keys<VECTORS>(keys, sum, [&](Vec sum_so_far, int64_t j, int c) VSTAR_INLINE {
    float* cell = cells + (j * VECTORS + c) * kLanes;
    const Vec p = exp2_nonpositive(sub(load(cell), m[c]));
    store(cell, p);
    return add(sum_so_far, p);
  });
}

// Sets numbers to one over them.
template <int VECTORS>
inline void invert(float* x) {
  for (int c = 0; c < VECTORS; ++c) {
    store(x + c * kLanes, div(broadcast(1.0f), load(x + c * kLanes)));
  }
}

// Adds factor[i] * cells[j][i] to sums[j][i], which are laid out as DeltaSums says.
template <int VECTORS>
VSTAR_STAGE void add_to_sums(int64_t keys, const float* factor, const float* cells,
                             int64_t block_stride, int64_t key_stride, float* sums) {
  Vec f[VECTORS];
  for (int c = 0; c < VECTORS; ++c) f[c] = load(factor + c * kLanes);
  for (int64_t block = 0; block < keys; block += kLanes, sums += kLanes * block_stride) {
    const int64_t rest = min64(kLanes, keys - block);
    for (int64_t j = 0; j < rest; ++j) {
      for (int c = 0; c < VECTORS; ++c, cells += kLanes) {
        float* sum = sums + j * key_stride + c * kLanes;
        store(sum, fma(f[c], load(cells), load(sum)));
      }
    }
  }
}

// Adds factor[i] times the sum of cells[j][i] over each block of keys to sums[block][i], whose rows
// are `stride` apart.
template <int VECTORS>
VSTAR_STAGE void add_to_block_sums(int64_t keys, int64_t block, const float* factor,
                                   const float* cells, int64_t stride, float* sums) {
  for (int64_t begin = 0; begin < keys; begin += block, sums += stride) {
    const int64_t end = min64(begin + block, keys);
    float total[VECTORS * kLanes];
    sum_over_keys<VECTORS>(end - begin, total, [&](Vec sum, int64_t j, int c) VSTAR_INLINE {
      return add(sum, load(cells + ((begin + j) * VECTORS + c) * kLanes));
    });
    for (int c = 0; c < VECTORS; ++c) {
      float* out = sums + c * kLanes;
      store(out, fma(load(factor + c * kLanes), load(total + c * kLanes), load(out)));
    }
  }
}

// Whether vectors of results of a type are lines, which alone are stored past the caches.
template <typename T>
constexpr bool kCanPassCaches = kStoresPastCaches && sizeof(T) == sizeof(float);

// Returns whether a tensor's rows are to be stored past the caches, and every vector is a line.
template <typename T>
bool can_pass_caches(const Problem& p, const void* tensor, const Strides& s) {
  const int64_t strides = s.batch | s.space | s.frame | s.head | p.head_dim;
  return kCanPassCaches<T> && p.past_caches && strides % kLanes == 0 &&
         reinterpret_cast<uintptr_t>(tensor) % (kLanes * sizeof(float)) == 0;
}

// Where a product's rows go. They are summed up in blocks: `partial` carries the sums of the blocks
// so far, in whole tiles, and the last block writes `out`, row r times scale[r * scale_stride].
template <typename T>
struct ProductOut {
  T* out;
  int64_t stride;
  float* partial;
  int64_t partial_stride;
  const float* scale;
  int64_t scale_stride;
  bool past_caches;  // how `out` is stored, see can_pass_caches()
  int64_t rows = 0;
  bool is_first_block = true, is_last_block = true;

  ProductOut tile_at(int64_t row, int64_t column) const {
    ProductOut tile = *this;
    tile.out += row * stride + column;
    tile.partial += row * partial_stride + column;
    tile.scale += row * scale_stride;
    tile.rows -= row;
    return tile;
  }

  // Takes a tile's sums; with PARTIAL the last vector of columns has `tail` lanes.
  template <bool PARTIAL, int COLUMNS>
  VSTAR_INLINE void put(Vec (&sum)[kProductRows][COLUMNS], int tail) const {
    const ProductOut here = *this;  // in registers: the stores could be to the original
    if (!here.is_first_block) {
      unrolled<kProductRows, COLUMNS>([&](auto r, auto c) VSTAR_INLINE {
        sum[r][c] = add(sum[r][c], load(here.partial + r * here.partial_stride + c * kLanes));
      });
    }
    if (!here.is_last_block) {
      unrolled<kProductRows, COLUMNS>([&](auto r, auto c) VSTAR_INLINE {
        store(here.partial + r * here.partial_stride + c * kLanes, sum[r][c]);
      });
      return;
    }
    const auto write = [&](const auto& store_vector) VSTAR_INLINE {
      unrolled<kProductRows>([&](auto r) VSTAR_INLINE {
        if (r >= here.rows) return;
        const Vec factor = broadcast(here.scale + r * here.scale_stride);
        unrolled<COLUMNS>([&](auto c) VSTAR_INLINE {
          store_vector(c, here.out + r * here.stride + c * kLanes, mul(sum[r][c], factor));
        });
      });
    };
    if constexpr (kCanPassCaches<T> && !PARTIAL) {
      if (here.past_caches) {
        return write([](auto, T* to, Vec y) VSTAR_INLINE { store_past_caches(to, y); });
      }
    }
    write([&](auto c, T* to, Vec y) VSTAR_INLINE {
      if (PARTIAL && c == COLUMNS - 1) {
        store_partial(to, y, tail);
      } else {
        store(to, y);
      }
    });
  }
};

// What a product of a panel's cells and rows x sums over. Over keys, its results are the panel's
// queries: out_i = sum_j cells[j][i] x_j. Over the panel's queries they are the keys:
// out_j = sum_i cells[j][i] x_i.
enum class Over { keys, queries };

// Computes kProductRows results of a product over `count` rows x, in COLUMNS vectors of head_dim;
// with PARTIAL the last of them has `tail` lanes.
template <Over OVER, int COLUMNS, bool PARTIAL, typename Out>
VSTAR_STAGE void product_tile(const float* cells, int64_t lanes, const float* x,
                              int64_t x_stride, int64_t count, int tail, const Out& tile) {
  Vec sum[kProductRows][COLUMNS];
  unrolled<kProductRows, COLUMNS>([&](auto r, auto c) VSTAR_INLINE { sum[r][c] = zero(); });
  for (int64_t n = 0; n < count; ++n) {
    Vec v[COLUMNS];
    unrolled<COLUMNS>([&](auto c) VSTAR_INLINE {
      const float* p = x + n * x_stride + c * kLanes;
      v[c] = PARTIAL && c == COLUMNS - 1 ? load_partial(p, tail) : load(p);
    });
    unrolled<kProductRows>([&](auto r) VSTAR_INLINE {
      const Vec w = broadcast(cells + (OVER == Over::keys ? n * lanes + r : r * lanes + n));
      unrolled<COLUMNS>([&](auto c) VSTAR_INLINE { sum[r][c] = fma(w, v[c], sum[r][c]); });
    });
  }
  tile.template put<PARTIAL>(sum, tail);
}

// Does as product_tile for numbers of columns and of the last one's lanes known only at run time.
template <Over OVER, int COLUMNS = kProductVectors, typename Out>
void product_columns(int columns, const float* cells, int64_t lanes, const float* x,
                     int64_t x_stride, int64_t count, int tail, const Out& tile) {
  if constexpr (COLUMNS > 0) {
    if (columns != COLUMNS) {
      product_columns<OVER, COLUMNS - 1>(columns, cells, lanes, x, x_stride, count, tail, tile);
    } else if (tail == 0) {
      product_tile<OVER, COLUMNS, false>(cells, lanes, x, x_stride, count, tail, tile);
    } else {
      product_tile<OVER, COLUMNS, true>(cells, lanes, x, x_stride, count, tail, tile);
    }
  }
}

// Returns in how many tiles product() takes so many rows of head_dim.
inline int64_t product_tiles(int64_t rows, int64_t head_dim) {
  return divide_up(rows, kProductRows) * divide_up(divide_up(head_dim, kLanes), kProductVectors);
}

// Computes a product, or before its last block the sums so far. Calls before_tile() for each tile.
// Of cells and partial sums, whole tiles of rows are touched.
template <Over OVER, typename Out, typename BeforeTile>
void product(const float* cells, int lanes, const float* x, int64_t x_stride, int64_t count,
             int64_t head_dim, const Out& out, const BeforeTile& before_tile) {
  const int vectors = static_cast<int>(divide_up(head_dim, kLanes));
  const int tiles = static_cast<int>(divide_up(vectors, kProductVectors));
  const int tail = static_cast<int>(head_dim % kLanes);
  for (int t = 0, column = 0; t < tiles; ++t) {
    const int columns = vectors / tiles + (t < vectors % tiles);  // as even as can be
    const int d = column * kLanes;
    column += columns;
    for (int64_t r = 0; r < out.rows; r += kProductRows) {
      before_tile();
      product_columns<OVER>(columns, cells + (OVER == Over::keys ? r : r * lanes), lanes, x + d,
                            x_stride, count, t == tiles - 1 ? tail : 0, out.tile_at(r, d));
    }
  }
}

}  // namespace vstar::VSTAR_ISA
