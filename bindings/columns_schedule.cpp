#include "columns_schedule.h"

#include <algorithm>
#include <optional>
#include <vector>

#include "dispatch.h"

namespace vstar {
namespace {

constexpr int64_t kPanel = 32;  // a multiple of every instruction set's panel

int64_t divide_up(int64_t x, int64_t divisor) { return (x + divisor - 1) / divisor; }

// Returns the operations of the product of all queries of a head and the keys.
double product_operations(const ColumnArgs& a) {
  return 2.0 * static_cast<double>(a.queries) * static_cast<double>(a.keys) *
         static_cast<double>(a.head_dim);
}

// A call's columns as lists of what is not zero.
class SparseColumns {
 public:
  // Fills the arguments' lists, which refer to this, where they take less than all weights do.
  explicit SparseColumns(ColumnArgs& args) {
    constexpr int64_t kEntriesOfKey = 4;
    const int64_t batches = args.column_weights_stride == 0 ? 1 : args.batch;
    const int64_t most = batches * args.keys * kEntriesOfKey;
    begin_.push_back(0);
    for (int64_t b = 0; b < batches; ++b) {
      const float* columns = args.column_weights + b * args.column_weights_stride;
      for (int64_t k = 0; k < args.columns; ++k) {
        for (int64_t j = 0; j < args.keys; ++j) {
          const float weight = columns[j * args.columns + k];
          if (weight != 0.0f) entries_.push_back({j, weight});
        }
        // A column of zeros has NaN where the weights have.
        if (begin_.back() == count()) entries_.push_back({0, 0.0f});
        if (count() > most) return;
        begin_.push_back(count());
      }
    }
    args.sparse = {entries_.data(), begin_.data(), batches == 1 ? 0 : args.columns};
  }

 private:
  int64_t count() const { return static_cast<int64_t>(entries_.size()); }

  std::vector<ColumnEntry> entries_;
  std::vector<int64_t> begin_;
};

// Returns into how many parts the queries are cut where one of `sequences` goes over the keys: parts
// of a few panels, for which the keys are packed once, but enough of them for all threads. A query's
// bits do not depend on it.
int64_t parts_of_queries(const ColumnArgs& a, int64_t sequences, const Threads& threads) {
  constexpr int64_t kMost = 256;  // queries, whose sums of weights are to stay in the second cache
  const int64_t panels = divide_up(a.queries, kPanel);
  const int64_t wanted = divide_up(8 * threads.count, sequences);
  return std::clamp<int64_t>(divide_up(a.queries, kMost), std::min(wanted, panels), panels);
}

}  // namespace

void run_columns_forward(ColumnArgs& args, const Threads& threads) {
  const Kernels& kernels = selected_kernels();
  args.sparse = {};
  std::optional<SparseColumns> sparse;
  if (args.maps) sparse.emplace(args);
  const int64_t parts = parts_of_queries(args, args.batch, threads);
  args.queries_per_block = divide_up(divide_up(args.queries, parts), kPanel) * kPanel;
  const int64_t blocks = divide_up(args.queries, args.queries_per_block);
  const double products = args.value ? 2.0 : 1.0;
  const double operations = products * product_operations(args) * static_cast<double>(args.heads);
  for_each_range(threads, args.batch * blocks, operations / static_cast<double>(blocks),
                 kernels.columns_scratch(args), [&](int64_t begin, int64_t end, float* scratch) {
                   for (int64_t item = begin; item < end; ++item) {
                     kernels.columns_forward(args, item, scratch);
                   }
                 });
}

void run_columns_backward(ColumnBackwardArgs& args, const Threads& threads) {
  // Where sums are kept, so many items are enough for any number of threads, and few enough for the
  // sums' memory; bits depend on the number, which does not depend on the threads.
  constexpr int64_t kItems = 8, kQueriesOfPart = 128;
  const Kernels& kernels = selected_kernels();
  const int64_t sequences = args.batch * args.heads;
  std::vector<float> sums;
  if (args.grad_key || args.grad_value) {
    const int64_t most = divide_up(args.queries, kQueriesOfPart);
    args.parts = std::max<int64_t>(1, std::min(divide_up(kItems, sequences), most));
    const int64_t padded_dim = divide_up(args.head_dim, kernels.lanes) * kernels.lanes;
    sums.resize(static_cast<size_t>(sequences * args.parts * 2 * args.keys * padded_dim));
    args.sums = sums.data();
  } else {
    args.parts = parts_of_queries(args, sequences, threads);
  }
  const double operations = (sums.empty() ? 3.0 : 5.0) * product_operations(args);
  for_each_range(threads, sequences * args.parts, operations / static_cast<double>(args.parts),
                 kernels.columns_backward_scratch(args),
                 [&](int64_t begin, int64_t end, float* scratch) {
                   for (int64_t item = begin; item < end; ++item) {
                     kernels.columns_backward(args, item, scratch);
                   }
                 });
  if (sums.empty()) return;
  for_each_range(threads, sequences,
                 static_cast<double>(sums.size()) / static_cast<double>(sequences), 0,
                 [&](int64_t begin, int64_t end, float*) {
                   for (int64_t sequence = begin; sequence < end; ++sequence) {
                     kernels.columns_backward_finish(args, sequence);
                   }
                 });
}

}  // namespace vstar
