// The pieces of a panel's computation (forward.h and backward.h put them together): packing,
// logits, bias, exponentials, products with rows. Queries lie along the lanes throughout.
#pragma once

#include "types.h"

#define VSTAR_INLINE __attribute__((always_inline))
// A function of its own for profilers (benchmarks/breakdown.py), long enough that the call is free.
#define VSTAR_STAGE __attribute__((noinline))

namespace vstar::VSTAR_ISA {

constexpr int kMaxVectors = 2;  // vectors of queries in a panel
// Sums over keys are taken in blocks of this many and then added up: a long running sum would lose
// a bit of the result for every fourfold of its length. A block's rows of V also stay in the cache.
constexpr int64_t kKeyBlock = 128;

constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kLn2 = 0.693147180559945309417f;
constexpr float kInfinity = __builtin_inff();

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t round_up(int64_t x, int64_t multiple) {
  return (x + multiple - 1) / multiple * multiple;
}

// body(Index<0>{}), ..., body(Index<COUNT - 1>{}): a loop whose indices are constants before the
// optimizer looks, without which GCC leaves arrays of accumulators in memory.
template <int I>
struct Index {
  constexpr operator int() const { return I; }
};
template <int COUNT, typename Body>
[[gnu::always_inline]] inline void unrolled(const Body& body) {
  if constexpr (COUNT > 0) {
    unrolled<COUNT - 1>(body);
    body(Index<COUNT - 1>{});
  }
}
// The same over a ROWS x COLUMNS tile: body(row, column).
template <int ROWS, int COLUMNS, typename Body>
[[gnu::always_inline]] inline void unrolled(const Body& body) {
  unrolled<ROWS * COLUMNS>([&](auto i) VSTAR_INLINE {
    body(Index<i / COLUMNS>{}, Index<i % COLUMNS>{});
  });
}

// 2^x for x <= 0, to float32 rounding; zero below 2^-126, NaN for NaN.
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
  return scale_by_power(p, whole);
}

// QK' is computed in *units* of head_dim: floats, or where the processor multiplies them pairs of
// bfloat16, which lie in memory as they are needed. The unused pointers choose by the unit's type.
inline Vec multiply_add(const float*, Vec a, Vec b, Vec c) { return fma(a, b, c); }
#if defined(VSTAR_BFLOAT16_PAIRS)
inline Vec multiply_add(const Pair*, Vec a, Vec b, Vec c) { return dot(a, b, c); }
#endif

// packed[d][lane] = unit d of row `lane`, zero in the lanes from `count` on. Rows are read as
// Source: their own type, or Pair.
template <typename Source, typename T>
VSTAR_STAGE void pack_queries(const T* rows, int64_t stride, int count, int lanes, int64_t units,
                              float* packed) {
  for (int lane = 0; lane < lanes; lane += kLanes) {
    for (int64_t d = 0; d < units; d += kLanes) {
      const int columns = static_cast<int>(min64(kLanes, units - d));
      Vec block[kLanes];
      for (int r = 0; r < kLanes; ++r) {
        const Source* row = reinterpret_cast<const Source*>(rows + (lane + r) * stride) + d;
        if (lane + r >= count) {
          block[r] = zero();
        } else if (columns == kLanes) {
          block[r] = load(row);
        } else {
          block[r] = load_partial(row, columns);
        }
      }
      transpose(block);
      for (int c = 0; c < columns; ++c) store(packed + (d + c) * lanes + lane, block[c]);
    }
  }
}

// A dense copy of rows, in units: of 16-bit rows that are widened, or of rows that lie too far apart
// for the caches. Rows are read as Source, as above.
template <typename Source, typename T>
VSTAR_STAGE void pack_rows(const T* rows, int64_t stride, int64_t count, int64_t units,
                           float* packed) {
  for (int64_t r = 0; r < count; ++r, packed += units) {
    const Source* row = reinterpret_cast<const Source*>(rows + r * stride);
    int64_t d = 0;
    for (; d + kLanes <= units; d += kLanes) store(packed + d, load(row + d));
    if (d < units) {
      const int rest = static_cast<int>(units - d);
      store_partial(packed + d, load_partial(row + d, rest), rest);
    }
  }
}

// The logits of ROWS keys against a panel of VECTORS vectors of queries; raises its maxima. They
// are scaled last: products that are equal stay so, whatever their terms, and it is the first of
// equal logits that takes the gradient through the maximum.
template <int ROWS, int VECTORS, typename Unit>
inline void logits_tile(const Unit* keys, int64_t key_stride, const float* queries, int64_t units,
                        float scale, float* logits, Vec (&row_max)[VECTORS]) {
  constexpr int lanes = VECTORS * kLanes;
  Vec sum[ROWS][VECTORS];
  unrolled<ROWS, VECTORS>([&](auto r, auto c) VSTAR_INLINE { sum[r][c] = zero(); });
  for (int64_t d = 0; d < units; ++d) {
    Vec q[VECTORS];
    unrolled<VECTORS>([&](auto c) VSTAR_INLINE { q[c] = load(queries + d * lanes + c * kLanes); });
    unrolled<ROWS>([&](auto r) VSTAR_INLINE {
      const Vec k = broadcast(keys + r * key_stride + d);
      unrolled<VECTORS>(
          [&](auto c) VSTAR_INLINE { sum[r][c] = multiply_add(keys, k, q[c], sum[r][c]); });
    });
  }
  const Vec factor = broadcast(scale);
  unrolled<ROWS, VECTORS>([&](auto r, auto c) VSTAR_INLINE {
    const Vec logit = mul(sum[r][c], factor);
    row_max[c] = max(row_max[c], logit);
    store(logits + r * lanes + c * kLanes, logit);
  });
}

// logits_tile for a number of keys below kKeyRows, known only at run time.
template <int VECTORS, int ROWS = kKeyRows - 1, typename Unit>
inline void logits_tail(int rows, const Unit* keys, int64_t key_stride, const float* queries,
                        int64_t units, float scale, float* logits, Vec (&row_max)[VECTORS]) {
  if constexpr (ROWS > 0) {
    if (rows == ROWS) {
      logits_tile<ROWS>(keys, key_stride, queries, units, scale, logits, row_max);
    } else {
      logits_tail<VECTORS, ROWS - 1>(rows, keys, key_stride, queries, units, scale, logits,
                                     row_max);
    }
  }
}

template <int VECTORS, typename Unit>
VSTAR_STAGE void logits_rows(const Unit* keys, int64_t key_stride, int rows, const float* queries,
                             int64_t units, float scale, float* logits, float* row_max) {
  Vec m[VECTORS];
  for (int c = 0; c < VECTORS; ++c) m[c] = load(row_max + c * kLanes);
  if (rows == kKeyRows) {
    logits_tile<kKeyRows>(keys, key_stride, queries, units, scale, logits, m);
  } else {
    logits_tail<VECTORS>(rows, keys, key_stride, queries, units, scale, logits, m);
  }
  for (int c = 0; c < VECTORS; ++c) store(row_max + c * kLanes, m[c]);
}

// Adds weight[i] * bias(j, i) to the logits; `row_max` becomes the new maxima. `count` of the lanes
// hold queries: the table may end behind the last of them.
template <int VECTORS>
VSTAR_STAGE void add_bias(const float* bias, int64_t key_stride, int64_t keys, int count,
                          const float* weight, float* logits, float* row_max) {
  Vec m[VECTORS];
  for (int c = 0; c < VECTORS; ++c) m[c] = broadcast(-kInfinity);
  for (int c = 0; c < VECTORS; ++c) {
    const int lanes = count - c * kLanes;
    const Vec w = load(weight + c * kLanes);
    for (int64_t j = 0; j < keys; ++j) {
      const float* row = bias + j * key_stride + c * kLanes;
      float* cell = logits + (j * VECTORS + c) * kLanes;
      const Vec delta = lanes >= kLanes ? load(row) : load_partial(row, lanes);
      const Vec x = fma(w, delta, load(cell));
      m[c] = max(m[c], x);
      store(cell, x);
    }
  }
  for (int c = 0; c < VECTORS; ++c) store(row_max + c * kLanes, m[c]);
}

// logits = 2^(logits - row_max); `inverse_sum` gets one over each row's sum.
template <int VECTORS>
VSTAR_STAGE void exponentiate(int64_t keys, const float* row_max, float* logits,
                              float* inverse_sum) {
  Vec m[VECTORS], sum[VECTORS];
  for (int c = 0; c < VECTORS; ++c) {
    m[c] = load(row_max + c * kLanes);
    sum[c] = zero();
  }
  for (int64_t start = 0; start < keys; start += kKeyBlock) {
    const int64_t end = min64(start + kKeyBlock, keys);
    Vec part[VECTORS];
    for (int c = 0; c < VECTORS; ++c) part[c] = zero();
    for (int64_t j = start; j < end; ++j) {
      for (int c = 0; c < VECTORS; ++c) {
        float* cell = logits + (j * VECTORS + c) * kLanes;
        const Vec p = exp2_nonpositive(sub(load(cell), m[c]));
        part[c] = add(part[c], p);
        store(cell, p);
      }
    }
    for (int c = 0; c < VECTORS; ++c) sum[c] = add(sum[c], part[c]);
  }
  for (int c = 0; c < VECTORS; ++c) {
    store(inverse_sum + c * kLanes, div(broadcast(1.0f), sum[c]));
  }
}

// sums[j][i] += factor[i] * cells[j][i], with the sums laid out as BiasSums says.
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

// Where a product's rows go. They are summed up in blocks: `partial` carries the sums of those
// before, in whole tiles, and the last one writes `out`, row r times scale[r * scale_stride].
template <typename T>
struct Target {
  T* out;
  int64_t stride;
  float* partial;
  int64_t partial_stride;
  const float* scale;
  int64_t scale_stride;
  int64_t rows = 0;
  bool first = true, last = true;  // block

  Target from(int64_t row, int64_t column) const {
    Target tile = *this;
    tile.out += row * stride + column;
    tile.partial += row * partial_stride + column;
    tile.scale += row * scale_stride;
    tile.rows -= row;
    return tile;
  }
};

// What a product sums over. Over keys its rows are the panel's queries: out_i = sum_j w[j][i] x_j.
// Over the panel's queries they are the keys: out_j = sum_i w[j][i] x_i.
enum class Over { keys, queries };

// kQueryRows rows of a product over `count` rows x, in COLUMNS vectors of head_dim; with PARTIAL
// the last of them has `tail` lanes.
template <Over OVER, int COLUMNS, bool PARTIAL, typename T>
VSTAR_STAGE void product_tile(const float* weights, int64_t lanes, const float* x,
                              int64_t x_stride, int64_t count, int tail, const Target<T>& tile) {
  Vec sum[kQueryRows][COLUMNS];
  unrolled<kQueryRows, COLUMNS>([&](auto r, auto c) VSTAR_INLINE { sum[r][c] = zero(); });
  for (int64_t n = 0; n < count; ++n) {
    Vec v[COLUMNS];
    unrolled<COLUMNS>([&](auto c) VSTAR_INLINE {
      const float* p = x + n * x_stride + c * kLanes;
      v[c] = PARTIAL && c == COLUMNS - 1 ? load_partial(p, tail) : load(p);
    });
    unrolled<kQueryRows>([&](auto r) VSTAR_INLINE {
      const Vec w = broadcast(weights + (OVER == Over::keys ? n * lanes + r : r * lanes + n));
      unrolled<COLUMNS>([&](auto c) VSTAR_INLINE { sum[r][c] = fma(w, v[c], sum[r][c]); });
    });
  }
  unrolled<kQueryRows, COLUMNS>([&](auto r, auto c) VSTAR_INLINE {
    Vec y = sum[r][c];
    float* partial = tile.partial + r * tile.partial_stride + c * kLanes;
    if (!tile.first) y = add(y, load(partial));
    if (!tile.last) {
      store(partial, y);
    } else if (r < tile.rows) {
      y = mul(y, broadcast(tile.scale + r * tile.scale_stride));
      T* out = tile.out + r * tile.stride + c * kLanes;
      if (PARTIAL && c == COLUMNS - 1) {
        store_partial(out, y, tail);
      } else {
        store(out, y);
      }
    }
  });
}

template <Over OVER, typename T, int COLUMNS = kMaxColumns>
void product_columns(int columns, const float* weights, int64_t lanes, const float* x,
                     int64_t x_stride, int64_t count, int tail, const Target<T>& tile) {
  if constexpr (COLUMNS > 0) {
    if (columns != COLUMNS) {
      product_columns<OVER, T, COLUMNS - 1>(columns, weights, lanes, x, x_stride, count, tail,
                                            tile);
    } else if (tail == 0) {
      product_tile<OVER, COLUMNS, false>(weights, lanes, x, x_stride, count, tail, tile);
    } else {
      product_tile<OVER, COLUMNS, true>(weights, lanes, x, x_stride, count, tail, tile);
    }
  }
}

// In how many tiles product() takes head_dim.
inline int column_tiles(int64_t head_dim) {
  const int vectors = static_cast<int>((head_dim + kLanes - 1) / kLanes);
  return (vectors + kMaxColumns - 1) / kMaxColumns;
}

// All rows of a product, or with `last` unset their sums so far. Calls before_tiles() for each
// column of tiles. Of weights and partial sums, whole tiles of rows are touched.
template <Over OVER, typename T, typename BeforeTiles>
void product(const float* weights, int lanes, const float* x, int64_t x_stride, int64_t count,
             int64_t head_dim, const Target<T>& out, const BeforeTiles& before_tiles) {
  const int vectors = static_cast<int>((head_dim + kLanes - 1) / kLanes);
  const int tiles = column_tiles(head_dim);
  const int tail = static_cast<int>(head_dim % kLanes);
  for (int t = 0, column = 0; t < tiles; ++t) {
    const int columns = vectors / tiles + (t < vectors % tiles);  // as even as can be
    const int d = column * kLanes;
    column += columns;
    before_tiles();
    for (int64_t r = 0; r < out.rows; r += kQueryRows) {
      product_columns<OVER>(columns, weights + (OVER == Over::keys ? r : r * lanes), lanes, x + d,
                            x_stride, count, t == tiles - 1 ? tail : 0, out.from(r, d));
    }
  }
}

}  // namespace vstar::VSTAR_ISA
