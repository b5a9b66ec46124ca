// Results that are sums over sequences: the mean map and the bias's gradient.
//
// The sequences are cut into groups, by the sizes of the call and not by the number of threads. A
// group is one thread's, its sums are its own, and in the end the groups are added up in their
// order: no atomics, and the same bits however many threads there are.
#pragma once

#include "types.h"

namespace vstar {

// Tasks are (batch element, group, chunk of rows), any of them at the same time.
class MapTasks {
 public:
  // Sets what forward_scratch() needs to know.
  explicit MapTasks(ForwardArgs& args);

  int64_t count() const { return args_.batch * groups_ * chunks_; }
  // For all groups; none where a batch element is one group, which goes straight into the map.
  int64_t partial_floats() const;
  void run(const Kernels& kernels, int64_t task, float* map, float* partials,
           float* scratch) const;
  // After all tasks.
  void finish(const float* partials, float* map) const;

 private:
  int64_t sequences() const { return args_.space * args_.heads; }  // of a batch element

  const ForwardArgs& args_;
  int64_t groups_, chunks_;
};

// Tasks are groups. The gradient has the bias's shape, (heads, columns) for a table over i - j and
// (heads, columns, columns) for a matrix over (j, i).
class BiasTasks {
 public:
  BiasTasks(const Kernels& kernels, const BackwardArgs& args, int64_t heads, int64_t columns);

  int64_t count() const { return groups_; }
  int64_t partial_floats() const { return groups_ * size_; }
  // Beyond backward_scratch().
  int64_t scratch_floats() const { return size_; }
  void run(int64_t task, float* partials, float* scratch) const;
  void finish(float* partials, float* grad_bias) const;

 private:
  bool is_table() const { return args_.bias_key_stride == -1; }
  void fold_table(const float* sums, float* grad) const;

  const Kernels& kernels_;
  const BackwardArgs& args_;
  int64_t heads_, columns_;
  BiasSums layout_;  // data unset
  int64_t origin_;   // of key 0 and query 0
  int64_t groups_, size_;
};

}  // namespace vstar
