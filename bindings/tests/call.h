// A forward call over memory that the test lays out: every tensor exactly as large as its strides
// reach, filled with random numbers, and so are the bias, the statistic and the scratch.
#pragma once

#include <cmath>
#include <cstring>
#include <functional>
#include <random>
#include <string>

#include "types.h"

struct Shape {
  int64_t batch = 2, space = 1, frames = 16, heads = 2, head_dim = 8;
  int64_t gap = 0;           // elements between rows
  bool heads_first = false;  // in memory: a head's frames lie next to each other
  vstar::ScalarType type = vstar::ScalarType::float32;
  vstar::Stat stat = vstar::Stat::row_max;
  bool regularized = true, dense = false, per_head = false;

  std::string name() const {
    return "N=" + std::to_string(frames) + " D=" + std::to_string(head_dim) +
           " gap=" + std::to_string(gap) + " type=" + std::to_string(static_cast<int>(type)) +
           " stat=" + std::to_string(static_cast<int>(stat)) +
           (heads_first ? " heads first" : "") + (regularized ? "" : " plain") +
           (dense ? " dense" : "") + (per_head ? " per head" : "");
  }
};

// Gives as many bytes to each of a call's blocks: query, key, value, out, bias, statistic, scratch.
using Allocate = std::function<void*(size_t bytes)>;

// The leading bits of a float are a bfloat16, and those of a small enough one give a float16.
inline void write_scalar(void* p, vstar::ScalarType type, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (type == vstar::ScalarType::float16) {  // truncated; the tests compare bits with bits
    const int exponent = static_cast<int>(bits >> 23 & 0xff) - 112;
    bits = exponent <= 0 ? 0 : (bits >> 16 & 0x8000) | exponent << 10 | (bits >> 13 & 0x3ff);
  } else if (type == vstar::ScalarType::bfloat16) {
    bits >>= 16;
  }
  std::memcpy(p, &bits, type == vstar::ScalarType::float32 ? 4 : 2);
}

// Whether the bits of an element are a NaN's.
inline bool is_nan(vstar::ScalarType type, uint32_t bits) {
  switch (type) {
    case vstar::ScalarType::float32: return (bits & 0x7fffffff) > 0x7f800000;
    case vstar::ScalarType::bfloat16: return (bits & 0x7fff) > 0x7f80;
    case vstar::ScalarType::float16: return (bits & 0x7fff) > 0x7c00;
  }
  return true;
}

class Call {
 public:
  Call(const Shape& s, const vstar::Kernels& kernels, const Allocate& allocate)
      : element_(s.type == vstar::ScalarType::float32 ? 4 : 2) {
    args_.type = s.type;
    args_.batch = s.batch;
    args_.space = s.space;
    args_.frames = s.frames;
    args_.heads = s.heads;
    args_.head_dim = s.head_dim;
    const int64_t row = s.head_dim + s.gap, sequence = s.frames * s.heads * row;
    const vstar::Strides strides = {s.space * sequence, sequence,
                                    s.heads_first ? row : s.heads * row,
                                    s.heads_first ? s.frames * row : row};
    args_.query_strides = args_.key_strides = args_.value_strides = args_.out_strides = strides;
    const int64_t size = s.batch * s.space * sequence - s.gap;  // to the last row's end
    out_bytes_ = static_cast<size_t>(size * element_);
    args_.query = random(allocate(out_bytes_), size, s.type);
    args_.key = random(allocate(out_bytes_), size, s.type);
    args_.value = random(allocate(out_bytes_), size, s.type);
    args_.out = allocate(out_bytes_);
    args_.scale = 1.0f / std::sqrt(static_cast<float>(s.head_dim));
    args_.strength = 0.7f;
    args_.stat = s.stat;
    args_.rows_per_item = s.frames;
    if (s.regularized) {
      const int64_t one = s.dense ? s.frames * s.frames : 2 * s.frames - 1;
      const float* bias = random_floats(allocate, s.per_head ? s.heads * one : one);
      args_.bias = bias + (s.dense ? 0 : s.frames - 1);
      args_.bias_key_stride = s.dense ? s.frames : -1;
      args_.bias_head_stride = s.per_head ? one : 0;
    }
    if (s.stat == vstar::Stat::tensor) {
      args_.stat_values = random_floats(allocate, s.batch * s.space * s.frames * s.heads);
      args_.stat_strides = {s.space * s.frames * s.heads, s.frames * s.heads, s.heads, 1};
    }
    scratch_bytes_ = static_cast<size_t>(kernels.forward_scratch(args_)) * 4;
    scratch_ = static_cast<float*>(allocate(scratch_bytes_));
    poison();
  }

  vstar::ForwardArgs& args() { return args_; }
  float* scratch() { return scratch_; }
  size_t scratch_bytes() const { return scratch_bytes_; }
  int64_t items() const {
    const int64_t chunks = (args_.frames + args_.rows_per_item - 1) / args_.rows_per_item;
    return args_.batch * args_.space * args_.heads * chunks;
  }

  // NaN in all types, so that what is read unwritten or left unwritten shows.
  void poison() {
    std::memset(args_.out, 0xff, out_bytes_);
    std::memset(scratch_, 0xff, scratch_bytes_);
  }
  // Gaps included: no one writes them.
  std::string out() const { return {static_cast<const char*>(args_.out), out_bytes_}; }

  // Whether a row holds NaN or a gap something else.
  bool complete() const {
    const int64_t rows = args_.batch * args_.space * args_.frames * args_.heads;
    const vstar::Strides& s = args_.out_strides;
    const int64_t row = s.frame < s.head ? s.frame : s.head;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t d = 0; d < row && (r + 1 < rows || d < args_.head_dim); ++d) {
        if (holds_nan(r * row + d) != (d >= args_.head_dim)) return false;
      }
    }
    return true;
  }

 private:
  bool holds_nan(int64_t index) const {
    uint32_t bits = 0;
    std::memcpy(&bits, static_cast<const char*>(args_.out) + index * element_, element_);
    return is_nan(args_.type, bits);
  }
  void* random(void* p, int64_t count, vstar::ScalarType type) {
    for (int64_t i = 0; i < count; ++i) {
      write_scalar(static_cast<char*>(p) + i * element_, type, uniform_(engine_));
    }
    return p;
  }
  float* random_floats(const Allocate& allocate, int64_t count) {
    auto* p = static_cast<float*>(allocate(static_cast<size_t>(count) * 4));
    for (int64_t i = 0; i < count; ++i) p[i] = uniform_(engine_);
    return p;
  }

  vstar::ForwardArgs args_ = {};
  int64_t element_;
  size_t out_bytes_, scratch_bytes_;
  float* scratch_;
  std::minstd_rand engine_{20240320};
  std::uniform_real_distribution<float> uniform_{-2.0f, 2.0f};
};
