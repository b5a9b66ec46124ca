// Several threads in one call: its items shared out, the inputs and the output shared, a scratch
// each, by hand and by the schedule. The bits are one thread's; ThreadSanitizer sees no race, here
// and where the instruction set is chosen while others compute.
#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#include "call.h"
#include "check.h"
#include "dispatch.h"
#include "schedule.h"

namespace {

using vstar::Form;
using vstar::ScalarType;

constexpr int kThreads = 4;

// Calls body(thread) in so many threads at the same time, and joins them all.
template <typename Body>
void in_threads(const Body& body) {
  std::atomic<int> waiting{kThreads};
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      // Together: a thread starts in the time that another one takes for all of its work.
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

// Checks that items cut among threads give one thread's bits.
void expect_same_items(const vstar::Kernels& kernels, const Shape& shape,
                       int64_t queries_per_item, int repeats) {
  Heap heap;
  ForwardCall call(shape, kernels, heap.allocate());
  call.args().queries_per_item = queries_per_item;
  const int64_t items = call.items();
  kernels.forward(call.args(), 0, items, call.scratch());
  const std::string expected = call.results();
  CHECK(call.complete(), "%s %s", kernels.name, shape.name().c_str());

  std::vector<std::vector<float>> scratch(kThreads);
  for (auto& floats : scratch) floats.resize(call.scratch_bytes() / 4);
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
    CHECK(call.results() == expected, "%s %s: other bits in threads, repeat %d", kernels.name,
          shape.name().c_str(), repeat);
  }
}

// Checks that tasks in any order on any thread, whose sums are added up at the end, give one
// thread's bits.
template <typename Call>
void expect_same_tasks(const vstar::Kernels& kernels, const Shape& shape, int repeats) {
  Heap heap;
  Call call(shape, kernels, heap.allocate());
  call.run_all();
  const std::string expected = call.results();
  CHECK(call.complete(), "%s %s", kernels.name, shape.name().c_str());
  std::vector<std::vector<float>> scratch(kThreads);
  for (auto& floats : scratch) floats.resize(call.scratch_bytes() / 4);
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
    CHECK(call.results() == expected, "%s %s: other bits in threads, repeat %d", kernels.name,
          shape.name().c_str(), repeat);
  }
}

// Cuts the items into ranges of the grain or a little more, in as many threads.
void parallel_for(int64_t items, int64_t grain, const vstar::RangeBody& body) {
  const int64_t ranges = std::max<int64_t>(1, std::min<int64_t>(kThreads, items / grain));
  in_threads([&](int64_t t) {
    if (t < ranges) body(items * t / ranges, items * (t + 1) / ranges);
  });
}

// Checks that whole calls through the schedule give one thread's bits.
void expect_same_calls(const vstar::Kernels& kernels, const Shape& shape) {
  const vstar::Threads threads = {kThreads, parallel_for};
  const auto expect_same = [&](auto& call, const char* name, const auto& run) {
    call.run_all();
    const std::string expected = call.results();
    call.poison();
    run();
    CHECK(call.complete() && call.results() == expected,
          "%s %s %s: other bits through the schedule", kernels.name, name, shape.name().c_str());
  };
  Heap heap;
  vstar::select_kernels(kernels);
  ForwardCall forward(shape, kernels, heap.allocate());
  expect_same(forward, "forward", [&] {
    vstar::run_forward(forward.args(), forward.delta(), nullptr, threads);
  });
  MapCall map(shape, kernels, heap.allocate());
  expect_same(map, "map", [&] {
    vstar::run_forward(map.args(), map.delta(), map.map(), threads);
  });
  BackwardCall backward(shape, kernels, heap.allocate());
  expect_same(backward, "backward", [&] {
    vstar::run_backward(backward.args(), backward.delta(), backward.grad_delta(), threads);
  });
}

void test_tasks(const vstar::Kernels& kernels, ScalarType type) {
  Shape shape = {.batch = 3, .space = 2, .frames = 7, .heads = 3, .head_dim = 13, .type = type};
  shape.map_gradient = true;
  for (const auto form : {Form::signed_table, Form::dense}) {
    shape.form = form;
    expect_same_tasks<MapCall>(kernels, shape, 10);
    expect_same_tasks<BackwardCall>(kernels, shape, 10);
  }
  shape.delta_gradient = false;
  shape.stat = vstar::Stat::tensor;
  expect_same_tasks<BackwardCall>(kernels, shape, 10);
  // More runs than one for a group of sequences.
  Shape many = {.batch = 70, .space = 10, .frames = 5, .heads = 9, .type = type};
  expect_same_tasks<BackwardCall>(kernels, many, 2);
  // A map's queries in chunks, its sequences in groups.
  Shape longer = {.batch = 1, .frames = 300, .heads = 2, .type = type};
  for (const int64_t block : {1, 7, 257, 300}) {
    longer.map_block = block;
    expect_same_tasks<MapCall>(kernels, longer, 3);
  }
  longer.map_by_head = true;
  longer.space = 3;
  expect_same_tasks<MapCall>(kernels, longer, 3);
}

void test_calls(const vstar::Kernels& kernels, ScalarType type) {
  for (const auto form :
       {Form::none, Form::gaussian, Form::symmetric, Form::signed_table, Form::dense}) {
    for (const int64_t frames : {7, 33, 300}) {
      if (frames == 300 && type != ScalarType::float32) continue;  // is cut alike in every type
      Shape shape = {.space = 5, .frames = frames, .head_dim = 13, .type = type, .form = form};
      shape.per_head = frames == 33;
      shape.delta_gradient = frames != 300;
      expect_same_calls(kernels, shape);
    }
  }
}

void test(const vstar::Kernels& kernels) {
  for (const auto type : {ScalarType::float32, ScalarType::bfloat16, ScalarType::float16}) {
    // Odd rows without a gap: two threads write next to each other in one cache line.
    expect_same_items(kernels, {.batch = 3, .frames = 7, .heads = 3, .head_dim = 13, .type = type},
                      7, 30);
    // Items within a sequence, as a few long ones are shared out.
    Shape longer = {.batch = 1, .frames = 200, .heads = 2, .head_dim = 21, .type = type};
    expect_same_items(kernels, longer, 64, 10);
    longer.heads_first = true;
    longer.form = Form::dense;
    longer.stat = vstar::Stat::map_max;
    expect_same_items(kernels, longer, 64, 10);
    test_tasks(kernels, type);
    test_calls(kernels, type);
    // While the next sequence's rows are fetched ahead, its thread writes them.
    expect_same_items(kernels,
                      {.batch = 16, .frames = 16, .heads = 2, .head_dim = 40, .type = type}, 16,
                      10);
  }
}

}  // namespace

int main() {
  choose_together();
  for_each_isa([](const vstar::Kernels& kernels) { test(kernels); });
  return finish();
}
