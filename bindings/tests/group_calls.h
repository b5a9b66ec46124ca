// Calls whose results are sums over sequences, task by task or all at once, over memory that the
// test lays out (call.h).
#pragma once

#include "call.h"
#include "groups.h"

// A forward with the mean map.
class MapCall : public Inputs {
 public:
  MapCall(const Shape& s, const vstar::Kernels& kernels, const Allocate& allocate)
      : Inputs(s), kernels_(kernels), args_(args(allocate)), tasks_(args_) {
    map_ = output_floats(allocate, s.batch * s.frames * s.frames);
    partials_ = output_floats(allocate, tasks_.partial_floats());
    allocate_scratch(allocate, kernels.forward_scratch(args_));
    poison();
  }

  int64_t tasks() const { return tasks_.count(); }
  void run(int64_t task, float* scratch) {
    tasks_.run(kernels_, task, map_, partials_, scratch);
  }
  void finish() { tasks_.finish(partials_, map_); }
  void run_all() {
    for (int64_t task = 0; task < tasks(); ++task) run(task, scratch());
    finish();
  }

  const vstar::Problem& problem() const { return args_; }
  const float* map() const { return map_; }
  bool complete() const { return is_complete(args_.out); }

 private:
  vstar::ForwardArgs args(const Allocate& allocate) {
    vstar::ForwardArgs a = {};
    set(a, allocate);
    a.out = output(allocate, bytes());
    a.out_strides = strides_;
    return a;
  }

  const vstar::Kernels& kernels_;
  vstar::ForwardArgs args_;
  vstar::MapTasks tasks_;
  float *map_, *partials_;
};

// A backward, with the gradients to the bias (unless the shape says not) and to a tensor statistic
// where there are such. Its tasks are groups of sequences, or single sequences.
class BackwardCall : public Inputs {
 public:
  BackwardCall(const Shape& s, const vstar::Kernels& kernels, const Allocate& allocate)
      : Inputs(s),
        kernels_(kernels),
        args_(args(allocate)),
        with_bias_(s.regularized && s.bias_gradient),
        groups_(kernels, args_, s.per_head ? s.heads : 1,
                s.dense ? s.frames : 2 * s.frames - 1) {
    int64_t scratch_floats = kernels.backward_scratch(args_);
    if (with_bias_) {
      grad_bias_ = output_floats(allocate, bias_size());
      partials_ = output_floats(allocate, groups_.partial_floats());
      scratch_floats += groups_.scratch_floats();
    }
    allocate_scratch(allocate, scratch_floats);
    poison();
  }

  int64_t tasks() const {
    return with_bias_ ? groups_.count() : args_.batch * args_.space * args_.heads;
  }
  void run(int64_t task, float* scratch) {
    if (with_bias_) {
      groups_.run(task, partials_, scratch);
    } else {
      kernels_.backward(args_, task, task + 1, scratch);
    }
  }
  void finish() {
    if (with_bias_) groups_.finish(partials_, grad_bias_);
  }
  void run_all() {
    for (int64_t task = 0; task < tasks(); ++task) run(task, scratch());
    finish();
  }

  const vstar::BackwardArgs& problem() const { return args_; }
  const float* grad_bias() const { return grad_bias_; }
  bool complete() const {
    return is_complete(args_.grad_query) && is_complete(args_.grad_key) &&
           is_complete(args_.grad_value);
  }

 private:
  vstar::BackwardArgs args(const Allocate& allocate) {
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
    if (s.map_gradient) a.grad_map = random_floats(allocate, s.batch * s.frames * s.frames);
    a.grad_query = output(allocate, bytes());
    a.grad_key = output(allocate, bytes());
    a.grad_value = output(allocate, bytes());
    a.grad_query_strides = a.grad_key_strides = a.grad_value_strides = strides_;
    if (s.stat == vstar::Stat::tensor && s.regularized && !s.detach_stat) {
      a.grad_stat = output_floats(allocate, s.batch * s.space * s.frames * s.heads);
      a.grad_stat_strides = a.stat_strides;
    }
    return a;
  }

  const vstar::Kernels& kernels_;
  vstar::BackwardArgs args_;
  bool with_bias_;
  vstar::BiasTasks groups_;
  float *grad_bias_ = nullptr, *partials_ = nullptr;
};
