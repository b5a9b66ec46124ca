#include "schedule.h"

#include <pthread.h>
#if defined(__linux__)
#include <dirent.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>

#include "dispatch.h"
#include "sums.h"

namespace vstar {
namespace {

struct FreeFloats {
  void operator()(float* p) const { ::operator delete[](p, std::align_val_t(64)); }
};
using Floats = std::unique_ptr<float[], FreeFloats>;

// Returns floats that begin with a cache line; null for none.
Floats allocate(int64_t floats) {
  if (floats == 0) return nullptr;
  return Floats(static_cast<float*>(
      ::operator new[](static_cast<size_t>(floats) * sizeof(float), std::align_val_t(64))));
}

int64_t sequences(const Problem& p) { return p.batch * p.space * p.heads; }

// Returns the operations of one sequence's product of N x N x D.
double product_operations(const Problem& p) {
  return 2.0 * static_cast<double>(p.frames) * static_cast<double>(p.frames) *
         static_cast<double>(p.head_dim);
}

// Returns whether so many results of query's shape have left the caches when the last one is there:
// whether a thread writes more of them than 8 MiB. From there on, attention and a projection of its
// output together take no longer for it, and soon less. What only multiplies an output by a number
// takes longer up to some 20 MiB.
bool leave_caches(const Problem& p, int64_t results, int64_t threads) {
  const int64_t numbers = results * sequences(p) * p.frames * p.head_dim;
  constexpr int64_t kNumbers = 2 << 20;
  return p.type == ScalarType::float32 && numbers / threads > kNumbers;
}

// Returns how many queries a thread takes at once. Sequences are shared out whole while there are
// enough of them.
int64_t queries_per_item(const Problem& p, int64_t threads) {
  constexpr int64_t kQueries = 64;  // a multiple of every instruction set's panel
  const int64_t wanted = 8 * threads;
  if (sequences(p) >= wanted) return p.frames;
  const int64_t items = (wanted + sequences(p) - 1) / sequences(p);
  const int64_t queries = (p.frames + items - 1) / items;
  return std::min(p.frames, (queries + kQueries - 1) / kQueries * kQueries);
}

// Returns how many items make a thread worth waking: a million operations, some 10 microseconds.
int64_t items_per_thread(double operations_of_item) {
  return std::max<int64_t>(1, static_cast<int64_t>(1e6 / operations_of_item));
}

// OpenMP keeps a thread's team of helpers with that thread. A fork copies the thread that calls it
// but not the team, for which GNU's runtime would then wait for ever, as it does under torch's own
// operators: such a thread computes alone. Whether it has a team cannot be asked, and torch's other
// operators make one too, but without a second thread in the process there is none.
thread_local bool has_team = false, may_lose_team = false;

bool may_have_team() {
#if defined(__linux__)
  DIR* const tasks = opendir("/proc/self/task");
  if (!tasks) return true;
  int entries = 0;
  while (readdir(tasks)) ++entries;
  closedir(tasks);
  return entries > 3;  // ".", ".." and the calling thread
#else
  return has_team;
#endif
}

// The thread that has forked before this library was loaded; 0: none.
std::atomic<int64_t> thread_of_early_fork{0};

bool is_thread_of_early_fork() {
#if defined(__linux__)
  return syscall(SYS_gettid) == thread_of_early_fork.load();
#else
  return false;
#endif
}

thread_local bool lost_team = is_thread_of_early_fork();
[[maybe_unused]] const int watching_forks =
    pthread_atfork([] { may_lose_team = may_have_team(); }, nullptr,
                   [] { lost_team = lost_team || may_lose_team; });

}  // namespace

void for_each_range(const Threads& threads, int64_t items, double operations_of_item,
                    int64_t scratch_floats, const ScratchBody& body) {
  const auto with_scratch = [&](int64_t begin, int64_t end) {
    const Floats scratch = allocate(scratch_floats);
    body(begin, end, scratch.get());
  };
  const int64_t grain = items_per_thread(operations_of_item);
  if (lost_team) return with_scratch(0, items);
  has_team = has_team || (items > grain && threads.count > 1);
  threads.parallel_for(items, grain, std::cref(with_scratch));
}

namespace {

// Calls body(task, scratch) for all tasks.
template <typename Body>
void for_each_task(const Threads& threads, int64_t tasks, double operations,
                   int64_t scratch_floats, const Body& body) {
  for_each_range(threads, tasks, operations / static_cast<double>(tasks), scratch_floats,
                 [&](int64_t begin, int64_t end, float* scratch) {
                   for (int64_t task = begin; task < end; ++task) body(task, scratch);
                 });
}

}  // namespace

int64_t parts_of_sequence(const BackwardArgs& a) {
  // So many items are enough for any number of threads, and few enough for their sums' memory.
  constexpr int64_t kItems = 8, kQueries = 256;
  // The map's maximum takes what all queries together add to its gradient.
  if (a.delta && a.stat == Stat::map_max && !a.detach_stat) return 1;
  const int64_t wanted = (kItems + sequences(a) - 1) / sequences(a);
  return std::max<int64_t>(1, std::min(wanted, a.frames / kQueries));
}

bool is_empty(const Problem& p) {
  return sequences(p) == 0 || p.frames == 0 || p.head_dim == 0;
}

void run_forward(ForwardArgs& args, const UserDelta& delta, float* map, const Threads& threads) {
  const Kernels& kernels = selected_kernels();
  const Floats layout = allocate(layout_floats(delta, args.frames));
  lay_out(delta, layout.get(), args);
  args.past_caches = leave_caches(args, 1, threads.count);
  const double operations = 2 * product_operations(args);  // of a sequence
  if (map) {
    const MapTasks tasks(args);
    const Floats group_sums = allocate(tasks.group_floats());
    for_each_task(threads, tasks.count(), operations * static_cast<double>(sequences(args)),
                  kernels.forward_scratch(args), [&](int64_t task, float* scratch) {
                    tasks.run(kernels, task, map, group_sums.get(), scratch);
                  });
    tasks.finish(group_sums.get(), map);
    return;
  }
  args.queries_per_item = queries_per_item(args, threads.count);
  const int64_t items = (args.frames + args.queries_per_item - 1) / args.queries_per_item;
  for_each_range(threads, sequences(args) * items, operations / static_cast<double>(items),
                 kernels.forward_scratch(args), [&](int64_t begin, int64_t end, float* scratch) {
                   kernels.forward(args, begin, end, scratch);
                 });
}

void run_backward(BackwardArgs& args, const UserDelta& delta, float* grad_delta,
                  const Threads& threads) {
  const Kernels& kernels = selected_kernels();
  const Floats layout = allocate(layout_floats(delta, args.frames));
  lay_out(delta, layout.get(), args);
  args.past_caches = leave_caches(args, 3, threads.count);
  args.parts = parts_of_sequence(args);
  const int64_t items = sequences(args) * args.parts;
  const Floats part_sums = allocate(args.parts == 1 ? 0 : items * kernels.backward_sums(args));
  args.part_sums = part_sums.get();
  const double operations = 5 * product_operations(args);  // of a sequence
  const int64_t scratch_floats = kernels.backward_scratch(args);
  if (grad_delta) {
    const DeltaTasks tasks(kernels, args, delta);
    const Floats group_sums = allocate(tasks.group_floats());
    for_each_task(threads, tasks.count(), operations * static_cast<double>(sequences(args)),
                  tasks.scratch_floats() + scratch_floats, [&](int64_t task, float* scratch) {
                    tasks.run(task, group_sums.get(), scratch);
                  });
    tasks.finish(group_sums.get(), grad_delta);
  } else {
    for_each_range(threads, items, operations / static_cast<double>(args.parts), scratch_floats,
                   [&](int64_t begin, int64_t end, float* scratch) {
                     kernels.backward(args, begin, end, scratch);
                   });
  }
  if (args.parts == 1) return;
  for_each_range(threads, sequences(args),
                 static_cast<double>(args.parts * kernels.backward_sums(args)), 0,
                 [&](int64_t begin, int64_t end, float*) {
                   for (int64_t sequence = begin; sequence < end; ++sequence) {
                     kernels.backward_finish(args, sequence);
                   }
                 });
}

}  // namespace vstar

// Python calls this where the library is loaded in a process that was forked before: the thread of
// this number (0: none) may have lost a team in that fork.
extern "C" __attribute__((visibility("default"))) void vstar_kernels_forked(int64_t thread) {
  vstar::thread_of_early_fork.store(thread);
}
