// Δ's layout, converted here and nowhere else: from the one in which the library's users hold it to
// the one that the kernels read, and the gradient back.
//
// Users hold Δ as vstar_kernels/attention/bias.py says, for a query's frame i and a key's frame j:
//
//     gaussian    (2N - 1)                       a table over j - i that is its own mirror image
//     symmetric   (L) or (heads, L)              a table over |j - i|, L >= N
//     signed      (2L - 1) or (heads, 2L - 1)    a table over j - i, L >= N
//     dense       (N, N) or (heads, N, N)        row i, column j
//
// The kernels take queries along their lanes, so Δ of consecutive queries must lie next to each
// other: they read a table over i - j, or a transposed matrix (Problem in types.h). Subnormal entries
// are zero there, as they are in the gaussian's table.
#pragma once

#include "types.h"

namespace vstar {

// The numbers are those of the operators' schemas.
enum class Form : int32_t { none = 0, gaussian = 1, symmetric = 2, signed_table = 3, dense = 4 };

// Δ, or a tensor for its gradient, as the user holds it.
struct UserDelta {
  Form form = Form::none;
  const float* data;
  int64_t heads;   // 1: the same Δ for all heads
  int64_t length;  // of a table; the frames of a matrix
  // In elements: of heads, of a matrix's rows, of a table's entries or a matrix's columns.
  int64_t head_stride, row_stride, stride;

  bool is_table() const { return form != Form::dense; }
  // Returns where a table has the distance j - i.
  int64_t entry(int64_t distance) const;
};

// Returns how many floats lay_out() needs; none where the kernels read the gaussian's own table.
int64_t layout_floats(const UserDelta& delta, int64_t frames);

// Sets the problem's delta to Δ as the kernels read it, in `floats`.
void lay_out(const UserDelta& delta, float* floats, Problem& problem);

// Writes one head's gradient into `grad`, which is contiguous: of a table from its sums over
// i - j, the middle one of which is *by_distance, or of a matrix from its sums over (j, i), whose
// rows are key_stride apart.
void write_table_gradient(const UserDelta& delta, const float* by_distance, int64_t frames,
                          float* grad);
void write_matrix_gradient(const float* sums, int64_t key_stride, int64_t frames, float* grad);

}  // namespace vstar
