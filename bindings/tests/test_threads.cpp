// Several threads in one call: its items shared out, the inputs and the output shared, a scratch
// each. The bits are one thread's; ThreadSanitizer sees no race, here and where the instruction set
// is chosen while others compute.
#include <algorithm>
#include <atomic>
#include <deque>
#include <memory>
#include <thread>
#include <vector>

#include "check.h"
#include "group_calls.h"

namespace {

using vstar::ScalarType;

constexpr int kThreads = 4;

// Joins them all; body(thread).
template <typename Body>
void in_threads(const Body& body) {
  std::atomic<int> waiting{kThreads};
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      // Together: a thread starts in the time that another one takes for its whole share.
      --waiting;
      while (waiting > 0) std::this_thread::yield();
      body(t);
    });
  }
  for (auto& thread : threads) thread.join();
}

// Must run first: the list of instruction sets is made at its first use.
void choose_together() {
  const vstar::Kernels* best[kThreads];
  std::atomic<int> wrong{0};
  in_threads([&](int t) {
    best[t] = vstar::executable_kernels()[0];
    for (int i = 0; i < 2000; ++i) {
      const vstar::Kernels* const* list = vstar::executable_kernels();
      int count = 0;
      while (list[count]) ++count;
      const vstar::Kernels& mine = *list[(t + i) % count];
      vstar::select_kernels(mine);
      if (vstar::find_kernels(mine.name) != &mine) ++wrong;
      // Another thread's choice may have come in between, but nothing else.
      const vstar::Kernels* chosen = &vstar::selected_kernels();
      bool known = false;
      for (int k = 0; k < count; ++k) known = known || list[k] == chosen;
      if (!known) ++wrong;
    }
  });
  for (const auto* kernels : best) CHECK(kernels == best[0], "threads see other lists");
  CHECK(wrong == 0, "%d wrong choices", wrong.load());
}

void share(const vstar::Kernels& kernels, const Shape& shape, int64_t rows_per_item,
           int repeats) {
  std::deque<std::unique_ptr<char[]>> heap;
  const auto allocate = [&](size_t bytes) {
    heap.emplace_back(new char[bytes]);
    return heap.back().get();
  };
  Call call(shape, kernels, allocate);
  call.args().rows_per_item = rows_per_item;
  const int64_t items = call.items();
  kernels.forward(call.args(), 0, items, call.scratch());
  const std::string expected = call.out();
  CHECK(call.complete(), "%s %s", kernels.name, shape.name().c_str());

  std::vector<std::vector<float>> scratch(kThreads);
  for (auto& own : scratch) own.resize(call.scratch_bytes() / 4);
  for (int repeat = 0; repeat < repeats; ++repeat) {
    call.poison();
    // The borders move, so that every item is now and then a thread's first or last.
    int64_t cuts[kThreads + 1] = {};
    for (int t = 1; t < kThreads; ++t) cuts[t] = (items * t / kThreads + repeat) % (items + 1);
    cuts[kThreads] = items;
    std::sort(cuts, cuts + kThreads);
    in_threads([&](int t) {
      std::memset(scratch[t].data(), 0xff, call.scratch_bytes());
      kernels.forward(call.args(), cuts[t], cuts[t + 1], scratch[t].data());
    });
    CHECK(call.out() == expected, "%s %s: other bits in threads, repeat %d", kernels.name,
          shape.name().c_str(), repeat);
  }
}

// Tasks in any order on any thread, whose sums are added up at the end.
template <typename AnyCall>
void share_tasks(const vstar::Kernels& kernels, const Shape& shape, int repeats) {
  std::deque<std::unique_ptr<char[]>> heap;
  AnyCall call(shape, kernels, [&](size_t bytes) {
    heap.emplace_back(new char[bytes]);
    return heap.back().get();
  });
  call.run_all();
  const std::string expected = call.out();
  CHECK(call.complete(), "%s %s", kernels.name, shape.name().c_str());
  std::vector<std::vector<float>> scratch(kThreads);
  for (auto& own : scratch) own.resize(call.scratch_bytes() / 4);
  for (int repeat = 0; repeat < repeats; ++repeat) {
    call.poison();
    std::atomic<int64_t> next{0};
    in_threads([&](int t) {
      for (int64_t task = next++; task < call.tasks(); task = next++) {
        std::memset(scratch[t].data(), 0xff, call.scratch_bytes());
        call.run(call.tasks() - 1 - task, scratch[t].data());
      }
    });
    call.finish();
    CHECK(call.out() == expected, "%s %s: other bits in threads, repeat %d", kernels.name,
          shape.name().c_str(), repeat);
  }
}

void test_tasks(const vstar::Kernels& kernels, ScalarType type) {
  Shape shape = {.batch = 3, .space = 2, .frames = 7, .heads = 3, .head_dim = 13, .type = type};
  shape.map_gradient = true;
  for (const bool dense : {false, true}) {
    shape.dense = dense;
    share_tasks<MapCall>(kernels, shape, 30);
    share_tasks<BackwardCall>(kernels, shape, 30);
  }
  shape.bias_gradient = false;
  shape.stat = vstar::Stat::tensor;
  share_tasks<BackwardCall>(kernels, shape, 30);
  // A map's rows in chunks, its sequences in groups.
  share_tasks<MapCall>(kernels, {.batch = 1, .frames = 300, .heads = 2, .type = type}, 10);
}

void test(const vstar::Kernels& kernels) {
  for (const auto type : {ScalarType::float32, ScalarType::bfloat16, ScalarType::float16}) {
    // Odd rows without a gap: two threads write next to each other in one cache line.
    share(kernels, {.batch = 3, .frames = 7, .heads = 3, .head_dim = 13, .type = type}, 7, 100);
    // Items within a sequence, as a few long ones are shared out.
    Shape longer = {.batch = 1, .frames = 200, .heads = 2, .head_dim = 21, .type = type};
    share(kernels, longer, 64, 30);
    longer.heads_first = longer.dense = true;
    longer.stat = vstar::Stat::map_max;
    share(kernels, longer, 64, 10);
    test_tasks(kernels, type);
    // While the next sequence's rows are fetched ahead, its thread writes them.
    share(kernels, {.batch = 16, .frames = 16, .heads = 2, .head_dim = 40, .type = type}, 16, 30);
  }
}

}  // namespace

int main() {
  choose_together();
  for_each_isa([](const vstar::Kernels& kernels) { test(kernels); });
  return finish();
}
