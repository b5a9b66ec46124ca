// Calls over memory that the test lays out: every tensor exactly as large as its strides reach,
// filled with random numbers, and so are Δ, the statistic and the scratch.
#pragma once

#include <cmath>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "delta.h"
#include "schedule.h"
#include "sums.h"
#include "types.h"

struct Shape {
  int64_t batch = 2, space = 1, frames = 16, heads = 2, head_dim = 8;
  int64_t gap = 0;           // elements between rows
  bool heads_first = false;  // in memory: a head's frames lie next to each other
  vstar::ScalarType type = vstar::ScalarType::float32;
  vstar::Form form = vstar::Form::signed_table;
  bool per_head = false;
  int64_t extra = 0;  // frames that a table reaches beyond the call's
  vstar::Stat stat = vstar::Stat::row_max;
  bool clamp_negative = false;
  int64_t map_block = 1;  // frames over which the map is summed
  bool map_by_head = false;
  // Of the backward.
  bool detach_stat = false, delta_gradient = true, map_gradient = false;
  int64_t grad_out_dim_stride = 1;  // 0: one number for each row
  bool past_caches = false;

  int64_t map_blocks() const { return (frames + map_block - 1) / map_block; }
  int64_t map_heads() const { return map_by_head ? heads : 1; }
  int64_t map_size() const { return batch * map_heads() * map_blocks() * map_blocks(); }

  std::string name() const {
    return "N=" + std::to_string(frames) + " D=" + std::to_string(head_dim) +
           " gap=" + std::to_string(gap) + " type=" + std::to_string(static_cast<int>(type)) +
           " form=" + std::to_string(static_cast<int>(form)) + "+" + std::to_string(extra) +
           " stat=" + std::to_string(static_cast<int>(stat)) +
           (heads_first ? " heads first" : "") + (per_head ? " per head" : "") +
           (clamp_negative ? " clamped" : "") + (detach_stat ? " detached" : "") +
           (map_gradient ? " map" : "") + (map_by_head ? " by head" : "") +
           (past_caches ? " past caches" : "") +
           (map_block == 1 ? "" : " blocks of " + std::to_string(map_block)) +
           (grad_out_dim_stride == 1 ? "" : " grad_out " + std::to_string(grad_out_dim_stride));
  }
};

// Gives as many bytes to each of a call's blocks: its tensors and its scratch.
using Allocate = std::function<void*(size_t bytes)>;

// Blocks of exactly the size that is asked for.
class Heap {
 public:
  Allocate allocate() {
    return [this](size_t bytes) {
      blocks_.emplace_back(new char[bytes]);
      return blocks_.back().get();
    };
  }

 private:
  std::deque<std::unique_ptr<char[]>> blocks_;
};

// Writes a float in a type. The leading bits of a float are a bfloat16, and those of a small enough
// one give a float16.
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

// Returns whether the bits of an element are a NaN's.
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

  const vstar::UserDelta& delta() const { return delta_; }
  float* scratch() const { return static_cast<float*>(scratch_.data); }
  size_t scratch_bytes() const { return scratch_.bytes; }

  // Fills all that is written with NaN in all types, so that what is read unwritten or left
  // unwritten shows.
  void poison() {
    for (const Block& block : results_) std::memset(block.data, 0xff, block.bytes);
    std::memset(group_sums_.data, 0xff, group_sums_.bytes);
    std::memset(scratch_.data, 0xff, scratch_.bytes);
  }
  // Returns all results, gaps included: no one writes those.
  std::string results() const {
    std::string all;
    for (const Block& block : results_) all.append(static_cast<char*>(block.data), block.bytes);
    return all;
  }

 protected:
  explicit Inputs(const Shape& s)
      : shape_(s), element_(s.type == vstar::ScalarType::float32 ? 4 : 2) {
    const int64_t row = s.head_dim + s.gap, sequence = s.frames * s.heads * row;
    strides_ = {s.space * sequence, sequence, s.heads_first ? row : s.heads * row,
                s.heads_first ? s.frames * row : row};
    size_ = s.batch * s.space * sequence - s.gap;  // to the last row's end
    delta_.heads = 1;
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
    p.past_caches = s.past_caches;
    if (s.form != vstar::Form::none) {
      set_delta(allocate);
      const int64_t floats = vstar::layout_floats(delta_, s.frames);
      vstar::lay_out(delta_, static_cast<float*>(allocate(static_cast<size_t>(floats) * 4)), p);
    }
    if (s.stat == vstar::Stat::tensor) {
      p.stat_tensor = random_floats(allocate, s.batch * s.space * s.frames * s.heads);
      p.stat_strides = {s.space * s.frames * s.heads, s.frames * s.heads, s.heads, 1};
    }
  }

  void set_map(vstar::Problem& p) const {
    p.map_block = shape_.map_block;
    p.map_blocks = shape_.map_blocks();
    p.map_heads = shape_.map_heads();
  }

  void* result(const Allocate& allocate, size_t size) {
    results_.push_back({allocate(size), size});
    return results_.back().data;
  }
  float* result_floats(const Allocate& allocate, int64_t count) {
    return static_cast<float*>(result(allocate, static_cast<size_t>(count) * 4));
  }
  void allocate_scratch(const Allocate& allocate, int64_t floats, int64_t group_floats = 0) {
    group_sums_.bytes = static_cast<size_t>(group_floats) * 4;
    group_sums_.data = allocate(group_sums_.bytes);
    scratch_.bytes = static_cast<size_t>(floats) * 4;
    scratch_.data = allocate(scratch_.bytes);
  }
  float* group_sums() const { return static_cast<float*>(group_sums_.data); }

  size_t bytes() const { return static_cast<size_t>(size_ * element_); }
  int64_t delta_size() const { return delta_.heads * head_size(); }

  // Returns whether no row of a tensor holds NaN, and its gaps hold nothing else.
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
  vstar::UserDelta delta_ = {};

 private:
  struct Block {
    void* data;
    size_t bytes;
  };

  int64_t head_size() const { return delta_.is_table() ? delta_.length : delta_.head_stride; }

  // Draws Δ as the user holds it.
  void set_delta(const Allocate& allocate) {
    const Shape& s = shape_;
    const int64_t reach = s.frames + s.extra;
    delta_.form = s.form;
    delta_.heads = s.per_head ? s.heads : 1;
    delta_.length = 2 * reach - 1;
    if (s.form == vstar::Form::symmetric) delta_.length = reach;
    if (s.form == vstar::Form::dense) delta_.length = delta_.row_stride = s.frames;
    delta_.stride = 1;
    delta_.head_stride = delta_.is_table() ? delta_.length : s.frames * s.frames;
    float* floats = random_floats(allocate, delta_size());
    for (int64_t i = 0; s.form == vstar::Form::gaussian && i < delta_size(); ++i) {
      const int64_t entry = i % delta_.length;  // mirrored
      if (entry >= reach) floats[i] = floats[i - 2 * entry + delta_.length - 1];
    }
    delta_.data = floats;
  }

  // Returns the next number of a table: drawing them all would take longer than the kernels.
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

  std::vector<Block> results_;
  Block group_sums_, scratch_;
  size_t next_ = 0;
};

// A forward, item by item or all at once.
class ForwardCall : public Inputs {
 public:
  ForwardCall(const Shape& s, const vstar::Kernels& kernels, const Allocate& allocate)
      : Inputs(s), kernels_(kernels) {
    set(args_, allocate);
    args_.out = result(allocate, bytes());
    args_.out_strides = strides_;
    args_.queries_per_item = s.frames;
    allocate_scratch(allocate, kernels.forward_scratch(args_));
    poison();
  }

  vstar::ForwardArgs& args() { return args_; }
  int64_t items() const {
    const int64_t chunks = (args_.frames + args_.queries_per_item - 1) / args_.queries_per_item;
    return args_.batch * args_.space * args_.heads * chunks;
  }
  // Computes all items in two ranges, as two threads would take them.
  void run_all() {
    kernels_.forward(args_, 0, items() / 2, scratch());
    kernels_.forward(args_, items() / 2, items(), scratch());
  }
  bool complete() const { return is_complete(args_.out); }

 private:
  const vstar::Kernels& kernels_;
  vstar::ForwardArgs args_ = {};
};

// A forward with the mean map, task by task or all at once.
class MapCall : public Inputs {
 public:
  MapCall(const Shape& s, const vstar::Kernels& kernels, const Allocate& allocate)
      : Inputs(s), kernels_(kernels), args_(make_args(allocate)), tasks_(args_) {
    map_ = result_floats(allocate, s.map_size());
    allocate_scratch(allocate, kernels.forward_scratch(args_), tasks_.group_floats());
    poison();
  }

  int64_t tasks() const { return tasks_.count(); }
  void run(int64_t task, float* scratch) {
    tasks_.run(kernels_, task, map_, group_sums(), scratch);
  }
  void finish() { tasks_.finish(group_sums(), map_); }
  void run_all() {
    for (int64_t task = 0; task < tasks(); ++task) run(task, scratch());
    finish();
  }

  vstar::ForwardArgs& args() { return args_; }
  float* map() const { return map_; }
  bool complete() const { return is_complete(args_.out); }

 private:
  vstar::ForwardArgs make_args(const Allocate& allocate) {
    vstar::ForwardArgs a = {};
    set(a, allocate);
    set_map(a);
    a.out = result(allocate, bytes());
    a.out_strides = strides_;
    return a;
  }

  const vstar::Kernels& kernels_;
  vstar::ForwardArgs args_;
  vstar::MapTasks tasks_;
  float* map_;
};

// A backward, with the gradients to Δ (unless the shape says not) and to a given statistic where
// there are such. Its tasks are groups of items, or single items; an item is a sequence or a part.
class BackwardCall : public Inputs {
 public:
  BackwardCall(const Shape& s, const vstar::Kernels& kernels, const Allocate& allocate)
      : Inputs(s),
        kernels_(kernels),
        args_(make_args(allocate)),
        with_delta_(s.form != vstar::Form::none && s.delta_gradient),
        tasks_(kernels, args_, delta_) {
    int64_t scratch_floats = kernels.backward_scratch(args_), group_floats = 0;
    if (with_delta_) {
      grad_delta_ = result_floats(allocate, delta_size());
      group_floats = tasks_.group_floats();
      scratch_floats += tasks_.scratch_floats();
    }
    allocate_scratch(allocate, scratch_floats, group_floats);
    poison();
  }

  int64_t tasks() const {
    return with_delta_ ? tasks_.count() : sequences() * args_.parts;
  }
  void run(int64_t task, float* scratch) {
    if (with_delta_) {
      tasks_.run(task, group_sums(), scratch);
    } else {
      kernels_.backward(args_, task, task + 1, scratch);
    }
  }
  void finish() {
    if (with_delta_) tasks_.finish(group_sums(), grad_delta_);
    if (args_.parts == 1) return;
    for (int64_t s = 0; s < sequences(); ++s) kernels_.backward_finish(args_, s);
  }
  void run_all() {
    for (int64_t task = 0; task < tasks(); ++task) run(task, scratch());
    finish();
  }

  vstar::BackwardArgs& args() { return args_; }
  float* grad_delta() const { return grad_delta_; }
  bool complete() const {
    return is_complete(args_.grad_query) && is_complete(args_.grad_key) &&
           is_complete(args_.grad_value);
  }

 private:
  int64_t sequences() const { return args_.batch * args_.space * args_.heads; }

  vstar::BackwardArgs make_args(const Allocate& allocate) {
    const Shape& s = shape_;
    vstar::BackwardArgs a = {};
    set(a, allocate);
    a.detach_stat = s.detach_stat;
    // The gradient to the output lies as the output does, or has its own order.
    const int64_t dim = s.grad_out_dim_stride, row = dim == 0 ? 1 : dim * s.head_dim;
    a.grad_out_dim_stride = dim;
    a.grad_out_strides = dim == 1 ? strides_
                                  : vstar::Strides{s.space * s.frames * s.heads * row,
                                                   s.frames * s.heads * row, s.heads * row, row};
    const int64_t count = dim == 1 ? size_
                                   : s.batch * a.grad_out_strides.batch - (dim == 0 ? 0 : dim - 1);
    a.grad_out = random(allocate(static_cast<size_t>(count * element_)), count);
    if (s.map_gradient) {
      set_map(a);
      a.grad_map = random_floats(allocate, s.map_size());
    }
    a.grad_query = result(allocate, bytes());
    a.grad_key = result(allocate, bytes());
    a.grad_value = result(allocate, bytes());
    a.grad_query_strides = a.grad_key_strides = a.grad_value_strides = strides_;
    if (s.stat == vstar::Stat::tensor && s.form != vstar::Form::none && !s.detach_stat) {
      a.grad_stat = result_floats(allocate, s.batch * s.space * s.frames * s.heads);
      a.grad_stat_strides = a.stat_strides;
    }
    a.parts = vstar::parts_of_sequence(a);
    if (a.parts > 1) {
      const int64_t floats = s.batch * s.space * s.heads * a.parts * kernels_.backward_sums(a);
      const size_t sums_bytes = static_cast<size_t>(floats) * sizeof(float);
      a.part_sums = static_cast<float*>(allocate(sums_bytes));
      std::memset(a.part_sums, 0xff, sums_bytes);
    }
    return a;
  }

  const vstar::Kernels& kernels_;
  vstar::BackwardArgs args_;
  bool with_delta_;
  vstar::DeltaTasks tasks_;
  float* grad_delta_ = nullptr;
};
