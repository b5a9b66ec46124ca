// Calls over memory that the test lays out: every tensor exactly as large as its strides reach,
// filled with random numbers, and so are the bias, the statistic and the scratch.
#pragma once

#include <cmath>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "types.h"

struct Shape {
  int64_t batch = 2, space = 1, frames = 16, heads = 2, head_dim = 8;
  int64_t gap = 0;           // elements between rows
  bool heads_first = false;  // in memory: a head's frames lie next to each other
  vstar::ScalarType type = vstar::ScalarType::float32;
  vstar::Stat stat = vstar::Stat::row_max;
  bool regularized = true, dense = false, per_head = false, clamp_negative = false;
  // Of the backward.
  bool detach_stat = false, bias_gradient = true, map_gradient = false;
  int64_t grad_out_dim_stride = 1;  // 0: one number for each row

  std::string name() const {
    return "N=" + std::to_string(frames) + " D=" + std::to_string(head_dim) +
           " gap=" + std::to_string(gap) + " type=" + std::to_string(static_cast<int>(type)) +
           " stat=" + std::to_string(static_cast<int>(stat)) +
           (heads_first ? " heads first" : "") + (regularized ? "" : " plain") +
           (dense ? " dense" : "") + (per_head ? " per head" : "") +
           (clamp_negative ? " clamped" : "") + (detach_stat ? " detached" : "") +
           (map_gradient ? " map" : "") +
           (grad_out_dim_stride == 1 ? "" : " grad_out " + std::to_string(grad_out_dim_stride));
  }
};

// Gives as many bytes to each of a call's blocks: its tensors and its scratch.
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

// What both directions read, and how their tensors are laid out: all alike.
class Inputs {
 public:
  Inputs(const Inputs&) = delete;

  float* scratch() const { return scratch_.floats(); }
  size_t scratch_bytes() const { return scratch_.bytes; }

  // NaN in all types, so that what is read unwritten or left unwritten shows.
  void poison() {
    for (const Block& block : outputs_) std::memset(block.data, 0xff, block.bytes);
    std::memset(scratch_.data, 0xff, scratch_.bytes);
  }
  // All outputs, gaps included: no one writes those.
  std::string out() const {
    std::string all;
    for (const Block& block : outputs_) all.append(static_cast<char*>(block.data), block.bytes);
    return all;
  }

 protected:
  explicit Inputs(const Shape& s)
      : shape_(s), element_(s.type == vstar::ScalarType::float32 ? 4 : 2) {
    const int64_t row = s.head_dim + s.gap, sequence = s.frames * s.heads * row;
    strides_ = {s.space * sequence, sequence, s.heads_first ? row : s.heads * row,
                s.heads_first ? s.frames * row : row};
    size_ = s.batch * s.space * sequence - s.gap;  // to the last row's end
  }

  void set(vstar::Problem& p, const Allocate& allocate) {
    const Shape& s = shape_;
    p.type = s.type;
    p.batch = s.batch;
    p.space = s.space;
    p.frames = s.frames;
    p.heads = s.heads;
    p.head_dim = s.head_dim;
    p.query_strides = p.key_strides = p.value_strides = strides_;
    p.query = random(allocate(bytes()), size_);
    p.key = random(allocate(bytes()), size_);
    p.value = random(allocate(bytes()), size_);
    p.scale = 1.0f / std::sqrt(static_cast<float>(s.head_dim));
    p.strength = 0.7f;
    p.stat = s.stat;
    p.clamp_negative = s.clamp_negative;
    if (s.regularized) {
      const float* bias = random_floats(allocate, bias_size());
      p.bias = bias + (s.dense ? 0 : s.frames - 1);
      p.bias_key_stride = s.dense ? s.frames : -1;
      p.bias_head_stride = s.per_head ? bias_size() / s.heads : 0;
    }
    if (s.stat == vstar::Stat::tensor) {
      p.stat_values = random_floats(allocate, s.batch * s.space * s.frames * s.heads);
      p.stat_strides = {s.space * s.frames * s.heads, s.frames * s.heads, s.heads, 1};
    }
  }

  void* output(const Allocate& allocate, size_t size) {
    outputs_.push_back({allocate(size), size});
    return outputs_.back().data;
  }
  float* output_floats(const Allocate& allocate, int64_t count) {
    return static_cast<float*>(output(allocate, static_cast<size_t>(count) * 4));
  }
  void allocate_scratch(const Allocate& allocate, int64_t floats) {
    scratch_.bytes = static_cast<size_t>(floats) * 4;
    scratch_.data = allocate(scratch_.bytes);
  }

  size_t bytes() const { return static_cast<size_t>(size_ * element_); }
  int64_t bias_size() const {
    const int64_t columns = shape_.dense ? shape_.frames * shape_.frames : 2 * shape_.frames - 1;
    return shape_.per_head ? shape_.heads * columns : columns;
  }

  // Whether no row of a tensor holds NaN, and its gaps hold nothing else.
  bool is_complete(const void* tensor) const {
    const int64_t rows = shape_.batch * shape_.space * shape_.frames * shape_.heads;
    const int64_t row = shape_.head_dim + shape_.gap;
    for (int64_t i = 0; i < rows * row - shape_.gap; ++i) {
      uint32_t bits = 0;
      std::memcpy(&bits, static_cast<const char*>(tensor) + i * element_, element_);
      if (is_nan(shape_.type, bits) != (i % row >= shape_.head_dim)) return false;
    }
    return true;
  }

  void* random(void* p, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      write_scalar(static_cast<char*>(p) + i * element_, shape_.type, number());
    }
    return p;
  }
  float* random_floats(const Allocate& allocate, int64_t count) {
    auto* p = static_cast<float*>(allocate(static_cast<size_t>(count) * 4));
    for (int64_t i = 0; i < count; ++i) p[i] = number();
    return p;
  }

  Shape shape_;
  int64_t element_, size_;
  vstar::Strides strides_;

 private:
  struct Block {
    void* data;
    size_t bytes;
    float* floats() const { return static_cast<float*>(data); }
  };
  std::vector<Block> outputs_;
  Block scratch_;

  // From a table: drawing them all would take longer than the kernels.
  float number() {
    static const std::vector<float> table = [] {
      std::minstd_rand engine{20240320};
      std::uniform_real_distribution<float> uniform{-2.0f, 2.0f};
      std::vector<float> numbers(4099);
      for (float& x : numbers) x = uniform(engine);
      return numbers;
    }();
    if (next_ == table.size()) next_ = 0;
    return table[next_++];
  }
  size_t next_ = 0;
};

class Call : public Inputs {
 public:
  Call(const Shape& s, const vstar::Kernels& kernels, const Allocate& allocate) : Inputs(s) {
    set(args_, allocate);
    args_.out = output(allocate, bytes());
    args_.out_strides = strides_;
    args_.rows_per_item = s.frames;
    allocate_scratch(allocate, kernels.forward_scratch(args_));
    poison();
  }

  vstar::ForwardArgs& args() { return args_; }
  int64_t items() const {
    const int64_t chunks = (args_.frames + args_.rows_per_item - 1) / args_.rows_per_item;
    return args_.batch * args_.space * args_.heads * chunks;
  }
  bool complete() const { return is_complete(args_.out); }

 private:
  vstar::ForwardArgs args_ = {};
};
