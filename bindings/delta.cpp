#include "delta.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdlib>

namespace vstar {
namespace {

constexpr int64_t kTile = 16;  // floats: a cache line of each of the matrices in a transpose

// Sets out[c * out_stride + r] = in[r * row_stride + c * column_stride] for all r and c below size.
void transpose(const float* in, int64_t row_stride, int64_t column_stride, int64_t size, float* out,
               int64_t out_stride) {
  for (int64_t r0 = 0; r0 < size; r0 += kTile) {
    const int64_t r1 = std::min(r0 + kTile, size);
    for (int64_t c = 0; c < size; ++c) {
      for (int64_t r = r0; r < r1; ++r) {
        out[c * out_stride + r] = in[r * row_stride + c * column_stride];
      }
    }
  }
}

bool is_readable_in_place(const UserDelta& delta) {
  return delta.form == Form::gaussian && delta.stride == 1;
}

// Returns what the kernels compute with: a subnormal entry can cost a hundred cycles at each use.
float normal(float entry) { return std::abs(entry) < FLT_MIN ? 0.0f : entry; }

}  // namespace

int64_t UserDelta::entry(int64_t distance) const {
  return stride * (form == Form::symmetric ? std::abs(distance) : length / 2 + distance);
}

int64_t layout_floats(const UserDelta& delta, int64_t frames) {
  if (delta.form == Form::none || is_readable_in_place(delta)) return 0;
  return delta.heads * (delta.is_table() ? 2 * frames - 1 : frames * frames);
}

void lay_out(const UserDelta& delta, float* floats, Problem& problem) {
  if (delta.form == Form::none) return;
  const int64_t frames = problem.frames;
  float* const begin = floats;
  problem.delta = begin;
  if (is_readable_in_place(delta)) {
    problem.delta = delta.data + delta.entry(0);
    problem.delta_head_stride = delta.head_stride;
    problem.delta_key_stride = -1;
  } else if (delta.is_table()) {
    problem.delta = floats + frames - 1;
    problem.delta_head_stride = 2 * frames - 1;
    problem.delta_key_stride = -1;
    for (int64_t head = 0; head < delta.heads; ++head) {
      const float* table = delta.data + head * delta.head_stride;
      for (int64_t distance = frames - 1; distance > -frames; --distance) {
        *floats++ = table[delta.entry(distance)];
      }
    }
  } else {
    problem.delta_head_stride = frames * frames;
    problem.delta_key_stride = frames;
    for (int64_t head = 0; head < delta.heads; ++head, floats += frames * frames) {
      transpose(delta.data + head * delta.head_stride, delta.row_stride, delta.stride, frames,
                floats, frames);
    }
  }
  if (delta.heads == 1) problem.delta_head_stride = 0;
  std::transform(begin, begin + layout_floats(delta, frames), begin, normal);
}

void write_table_gradient(const UserDelta& delta, const float* by_distance, int64_t frames,
                          float* grad) {
  std::fill(grad, grad + delta.length, 0.0f);
  for (int64_t distance = 1 - frames; distance < frames; ++distance) {
    grad[delta.entry(distance)] += by_distance[-distance];
  }
}

void write_matrix_gradient(const float* sums, int64_t key_stride, int64_t frames, float* grad) {
  transpose(sums, key_stride, 1, frames, grad, frames);
}

}  // namespace vstar
