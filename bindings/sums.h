// Results that are sums over sequences: the mean map and Δ's gradient.
//
// The sequences are cut into groups, by the sizes of the call and not by the number of threads. A
// group is one thread's, its sums are its own, and in the end the groups are added up in their
// order: no atomics, and the same bits however many threads there are.
#pragma once

#include "delta.h"
#include "types.h"

namespace vstar {

// The mean maps, whose heads and blocks of frames the arguments give. Their tasks are (map, group,
// chunk of queries), and can run in any order, at the same time. A chunk is whole blocks of queries,
// or a part of one block: then the sums have a row for each part, and finish() adds those up.
class MapTasks {
 public:
  // Sets what forward_scratch() needs to know.
  explicit MapTasks(ForwardArgs& args);

  int64_t count() const { return maps() * groups_ * chunks_; }
  // Returns how many floats all groups' sums take: none where a map is one group of whole blocks,
  // which goes straight into it.
  int64_t group_floats() const;
  void run(const Kernels& kernels, int64_t task, float* maps, float* group_sums,
           float* scratch) const;
  // Writes the maps, after all tasks.
  void finish(const float* group_sums, float* out) const;

 private:
  int64_t maps() const { return args_.batch * args_.map_heads; }
  int64_t sequences() const { return args_.space * args_.heads / args_.map_heads; }  // of a map
  // Returns the n-th sequence of a map.
  int64_t sequence(int64_t map, int64_t n) const;
  int64_t group_size() const { return args_.map_blocks * parts_ * args_.map_blocks; }

  const ForwardArgs& args_;
  int64_t parts_;  // of a block of queries
  int64_t groups_, chunks_;
};

// Δ's gradient, in its user's layout. Its tasks are groups, of whole sequences or of their parts.
class DeltaTasks {
 public:
  DeltaTasks(const Kernels& kernels, const BackwardArgs& args, const UserDelta& delta);

  int64_t count() const { return groups_; }
  // Returns how many floats all groups' sums take.
  int64_t group_floats() const { return groups_ * size_; }
  // Returns how many floats of scratch a thread needs besides backward_scratch().
  int64_t scratch_floats() const { return size_; }
  void run(int64_t task, float* group_sums, float* scratch) const;
  // Writes the gradient, contiguous in its last dimensions, after all tasks.
  void finish(float* group_sums, float* grad_delta) const;

 private:
  void add_up_copies(float* sums) const;

  const Kernels& kernels_;
  const BackwardArgs& args_;
  UserDelta grad_;    // data unset
  DeltaSums layout_;  // data unset
  int64_t origin_;    // of key 0 and query 0
  int64_t items_, groups_, size_;
};

}  // namespace vstar
