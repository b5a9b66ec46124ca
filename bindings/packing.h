// A tensor's rows as the kernels read them: packed with the queries along the lanes, or one after
// the other in the unit that a product is computed in.
//
// QK' is computed in *units* of head_dim: floats, or where the processor multiplies them pairs of
// bfloat16, which lie in memory as they are needed.
#pragma once

#include "loops.h"
#include "types.h"

namespace vstar::VSTAR_ISA {

// Rows up to this many are used where they lie: they stay in the first cache at any stride.
constexpr int64_t kUnpackedRows = 32;

// How rows of T are read for a computation in Units. Where memory holds Units, rows are read as
// such; otherwise each element is converted into one unit.
template <typename T, typename Unit>
struct UnitSource {
  using Type = T;
  static constexpr int64_t kElements = 1;  // of T in a unit
  static constexpr bool kInPlace = false;  // whether rows can be used where they lie
};
template <>
struct UnitSource<float, float> {
  using Type = float;
  static constexpr int64_t kElements = 1;
  static constexpr bool kInPlace = true;
};
#if defined(VSTAR_BFLOAT16_PAIRS)
template <>
struct UnitSource<bfloat16, Pair> {
  using Type = Pair;
  static constexpr int64_t kElements = 2;
  static constexpr bool kInPlace = true;
};
#endif

// The types of a call: its tensors hold T, and QK' is computed in Units.
template <typename T, typename Unit>
struct Types {};

// Calls body with the types of a call.
template <typename Body>
void with_types(ScalarType type, [[maybe_unused]] int64_t head_dim, const Body& body) {
  switch (type) {
    case ScalarType::float32: return body(Types<float, float>());
    case ScalarType::bfloat16:
#if defined(VSTAR_BFLOAT16_PAIRS)
      if (head_dim % 2 == 0) return body(Types<bfloat16, Pair>());
#endif
      return body(Types<bfloat16, float>());
    case ScalarType::float16: return body(Types<float16, float>());
  }
}

// Rows that are a stride apart.
template <typename T>
struct StridedRows {
  const T* rows;
  int64_t stride;

  const T* operator()(int64_t r) const { return rows + r * stride; }
};

// Transposes `count` rows: packed[d][lane] is unit d of row_at(lane), zero in the lanes from `count`
// on. Rows are read as Source, which is their own type or Pair.
template <typename Source, typename RowAt>
VSTAR_STAGE void pack_queries(const RowAt& row_at, int count, int lanes, int64_t units,
                              float* packed) {
  for (int lane = 0; lane < lanes; lane += kLanes) {
    for (int64_t d = 0; d < units; d += kLanes) {
      const int columns = static_cast<int>(min64(kLanes, units - d));
      Vec block[kLanes];
      for (int r = 0; r < kLanes; ++r) {
        if (lane + r >= count) {
          block[r] = zero();
          continue;
        }
        const Source* row = reinterpret_cast<const Source*>(row_at(lane + r)) + d;
        if (columns == kLanes) {
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

template <typename Source, typename T>
void pack_queries(const T* rows, int64_t stride, int count, int lanes, int64_t units,
                  float* packed) {
  pack_queries<Source>(StridedRows<T>{rows, stride}, count, lanes, units, packed);
}

// Copies rows densely, in units: 16-bit rows that are widened, or rows that lie too far apart for
// the caches. Rows are read as Source, as above.
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

// Copies rows, in floats, each of which begins with a vector; zeros fill its last one.
template <typename T>
VSTAR_STAGE void pack_padded_rows(const T* rows, int64_t stride, int64_t count, int64_t head_dim,
                                  float* packed) {
  for (int64_t r = 0; r < count; ++r) {
    const T* row = rows + r * stride;
    int64_t d = 0;
    for (; d + kLanes <= head_dim; d += kLanes, packed += kLanes) store(packed, load(row + d));
    if (d < head_dim) {
      store(packed, load_partial(row + d, static_cast<int>(head_dim - d)));
      packed += kLanes;
    }
  }
}

// Copies rows densely, in floats, that are not contiguous themselves.
template <typename T>
VSTAR_STAGE void gather_rows(const T* rows, int64_t stride, int64_t dim_stride, int64_t count,
                             int64_t head_dim, float* packed) {
  for (int64_t r = 0; r < count; ++r, packed += head_dim) {
    const T* row = rows + r * stride;
    // All of a row is one number in the gradient of a sum.
    const int64_t read = dim_stride == 0 ? 1 : head_dim;
    for (int64_t d = 0; d < read; ++d) {
      store_partial(packed + d, load_partial(row + d * dim_stride, 1), 1);
    }
    for (int64_t d = read; d < head_dim; ++d) packed[d] = packed[0];
  }
}

// Rows of head_dim in units: the tensor's own where those serve, else a dense copy in `scratch`.
// Where they are read too seldom for a copy to pay, `unpacked_bytes` says up to which size they
// serve.
template <typename Unit>
struct UnitRows {
  const Unit* data;
  int64_t stride;  // in units

  template <typename T>
  UnitRows(const T* rows, int64_t row_stride, int64_t count, int64_t head_dim, float* scratch,
           int64_t unpacked_bytes = 0) {
    using Source = UnitSource<T, Unit>;
    const bool near = are_near<T>(count, row_stride, head_dim, unpacked_bytes);
    if (Source::kInPlace && near && row_stride % Source::kElements == 0) {
      data = reinterpret_cast<const Unit*>(rows);
      stride = row_stride / Source::kElements;
    } else {
      stride = head_dim / Source::kElements;
      pack_rows<typename Source::Type>(rows, row_stride, count, stride, scratch);
      data = reinterpret_cast<const Unit*>(scratch);
    }
  }

  const Unit* from(int64_t row) const { return data + row * stride; }

 private:
  // Returns whether rows are read as fast where they lie. A multiple of 1 KiB apart they share few
  // places of the first cache; only AVX-512 reads them from the second one faster than it copies.
  template <typename T>
  static bool are_near(int64_t count, int64_t stride, int64_t head_dim, int64_t unpacked_bytes) {
    constexpr int64_t size = sizeof(T);
    if (count <= kUnpackedRows || stride == head_dim) return true;
    const bool share_places = kLanes < 16 && stride * size % 1024 == 0;
    return count * head_dim * size <= unpacked_bytes && !share_places;
  }
};

}  // namespace vstar::VSTAR_ISA
