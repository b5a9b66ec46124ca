// Runs a call on several threads: cuts it into items, gives each thread its scratch, and keeps out
// of threads that a fork has lost. The threads are the caller's: nothing here knows of torch.
#pragma once

#include <functional>

#include "delta.h"
#include "types.h"

namespace vstar {

// Computes items [begin, end).
using RangeBody = std::function<void(int64_t begin, int64_t end)>;

// How the caller runs something on its threads.
struct Threads {
  int64_t count;  // at most so many at once
  // Calls `body` for ranges of at least `grain` items that together are [0, items), and returns
  // when all are done.
  void (*parallel_for)(int64_t items, int64_t grain, const RangeBody& body);
};

// Calls body(begin, end, scratch) for ranges of items that together are [0, items), on the threads,
// each with a scratch of so many floats of its own.
using ScratchBody = std::function<void(int64_t begin, int64_t end, float* scratch)>;
void for_each_range(const Threads& threads, int64_t items, double operations_of_item,
                    int64_t scratch_floats, const ScratchBody& body);

// Returns into how many parts the backward pass cuts a sequence's queries: one where there are
// enough sequences for any number of threads, as parts have sums of their own.
int64_t parts_of_sequence(const BackwardArgs& args);

// Returns whether a call has nothing to compute.
bool is_empty(const Problem& problem);

// Computes `out`, and the mean map where `map` is not null. Sets what the caller leaves open of the
// arguments: Δ, which the user holds as `delta`, and how the work is cut.
void run_forward(ForwardArgs& args, const UserDelta& delta, float* map, const Threads& threads);

// Computes the gradients, Δ's among them where `grad_delta` is not null.
void run_backward(BackwardArgs& args, const UserDelta& delta, float* grad_delta,
                  const Threads& threads);

}  // namespace vstar
