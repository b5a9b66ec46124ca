#include "frames_schedule.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "dispatch.h"

namespace vstar {
namespace {

// Tokens sorted by frame, and where an order that refers to them is stored.
struct SortedTokens {
  std::vector<int32_t> order;
  std::vector<int64_t> begin;
  FrameOrder view;

  SortedTokens(const FrameRuns& runs, int64_t tokens)
      : order(static_cast<size_t>(tokens)), begin(static_cast<size_t>(runs.frames) + 2) {
    const auto frame_of = [&](const FrameRun& run) {
      return static_cast<size_t>(run.frame < 0 ? runs.frames : run.frame);
    };
    for (int64_t r = 0; r < runs.count; ++r) {
      begin[frame_of(runs.runs[r]) + 1] += runs.runs[r].end - runs.runs[r].start;
    }
    for (size_t f = 1; f < begin.size(); ++f) begin[f] += begin[f - 1];
    std::vector<int64_t> next = begin;
    for (int64_t r = 0; r < runs.count; ++r) {
      const FrameRun& run = runs.runs[r];
      int64_t& place = next[frame_of(run)];
      for (int32_t token = run.start; token < run.end; ++token) {
        order[static_cast<size_t>(place++)] = token;
      }
    }
    view = {tokens, runs.frames, order.data(), begin.data()};
  }
};

int64_t divide_up(int64_t x, int64_t divisor) { return (x + divisor - 1) / divisor; }

// The orders of a call's tokens, which its arguments then refer to.
class SortedCall {
 public:
  SortedCall(FrameArgs& args, const FrameRuns& query_runs, const FrameRuns& key_runs, bool has_map)
      : frames_matter_(has_map || args.delta || args.offset || args.factor || args.band),
        queries_(sorted(query_runs, args.queries.tokens)),
        keys_(sorted(key_runs, args.keys.tokens)) {
    args.queries = queries_.view;
    args.keys = keys_.view;
  }

 private:
  SortedTokens sorted(const FrameRuns& runs, int64_t tokens) const {
    if (frames_matter_) return SortedTokens(runs, tokens);
    const FrameRun text = {0, static_cast<int32_t>(tokens), -1, 0};
    return SortedTokens({&text, 1, 0}, tokens);
  }

  bool frames_matter_;
  SortedTokens queries_, keys_;
};

// Returns how many queries go over the keys together. The more, the less often keys are packed, but
// the accumulators that a chunk of keys adds to are to stay in the second cache, all of a block's
// are to fit into a thread's share of memory, and blocks are to be enough for many threads. The
// number depends on the call alone, not on the threads.
int64_t queries_per_block(const FrameArgs& a, bool split) {
  constexpr int64_t kMost = 256, kFewest = 64, kItems = 64, kChunkKeys = 128;
  constexpr int64_t kCacheBytes = 640 << 10, kMostBytes = 5 << 19;
  const int64_t accumulators = split ? a.keys.frames + 1 : 1;
  // A chunk is of one frame, or of a few that are shorter.
  const int64_t of_chunk =
      std::min(accumulators, 1 + kChunkKeys * a.keys.frames / std::max<int64_t>(a.keys.tokens, 1));
  const int64_t accumulator_bytes = ((a.head_dim + 15) / 16 * 16) * 4;
  int64_t queries = kMost;
  while (queries > kFewest && (queries * of_chunk * accumulator_bytes > kCacheBytes ||
                               a.batch * a.heads * divide_up(a.queries.tokens, queries) < kItems)) {
    queries /= 2;
  }
  while (queries > 16 && queries * accumulators * accumulator_bytes > kMostBytes) queries /= 2;
  return queries;
}

// Sets the first row of sums of each block, and the number of rows: one for each frame of a block's
// queries, which are sorted.
std::vector<int64_t> map_rows(const FrameOrder& queries, int64_t per_block) {
  std::vector<int64_t> rows = {0};
  const int64_t tokens_of_frames = queries.begin[queries.frames];
  for (int64_t begin = 0, frame = 0; begin < queries.tokens; begin += per_block) {
    const int64_t end = std::min(begin + per_block, tokens_of_frames);
    int64_t count = 0;
    for (int64_t row = begin; row < end; row = queries.begin[frame + 1]) {
      while (queries.begin[frame + 1] <= row) ++frame;
      ++count;
    }
    rows.push_back(rows.back() + count);
  }
  return rows;
}

// Adds the blocks' sums up, in their order, to means over a frame's tokens.
void add_up_map(const FrameArgs& a, const FrameMap& map) {
  const int64_t frames = a.queries.frames, columns = a.keys.frames + 1;
  const int64_t heads_of_map = map.per_head ? 1 : a.heads;
  std::vector<double> total(static_cast<size_t>(columns));
  const int64_t* begin = a.queries.begin;
  for (int64_t m = 0; m < a.batch * a.heads / heads_of_map; ++m) {
    for (int64_t f = 0; f < frames; ++f) {
      std::fill(total.begin(), total.end(), 0.0);
      for (int64_t h = m * heads_of_map; h < (m + 1) * heads_of_map; ++h) {
        const int64_t last = (begin[f + 1] - 1) / a.queries_per_block;
        for (int64_t b = begin[f] / a.queries_per_block; b <= last; ++b) {
          // A block's rows begin with its first query's frame.
          const int64_t first_row = b * a.queries_per_block;
          const int64_t first =
              std::upper_bound(begin, begin + frames + 1, first_row) - begin - 1;
          const float* row =
              a.map_sums + (h * a.map_rows_per_head + a.map_rows[b] + f - first) * columns;
          for (size_t g = 0; g < total.size(); ++g) total[g] += row[g];
        }
      }
      const double rows = static_cast<double>(heads_of_map * (begin[f + 1] - begin[f]));
      float* out = map.data + (m * frames + f) * columns;
      for (size_t g = 0; g < total.size(); ++g) out[g] = static_cast<float>(total[g] / rows);
    }
  }
}

}  // namespace

bool are_valid(const FrameRuns& runs, int64_t tokens) {
  std::vector<int64_t> places(static_cast<size_t>(runs.frames) + 1);
  int64_t token = 0;
  for (int64_t r = 0; r < runs.count; ++r) {
    const FrameRun& run = runs.runs[r];
    if (run.start != token || run.end <= run.start || run.frame < -1 || run.frame >= runs.frames) {
      return false;
    }
    int64_t& place = places[static_cast<size_t>(run.frame < 0 ? runs.frames : run.frame)];
    if (run.frame >= 0 && run.index != place) return false;
    place += run.end - run.start;
    token = run.end;
  }
  // Each frame has a token.
  return token == tokens && std::find(places.begin(), places.end() - 1, 0) == places.end() - 1;
}

void run_frames_forward(FrameArgs& args, const FrameRuns& query_runs, const FrameRuns& key_runs,
                        const FrameMap& map, const Threads& threads) {
  const Kernels& kernels = selected_kernels();
  const SortedCall sorted(args, query_runs, key_runs, map.data != nullptr);
  const bool split = args.delta && (args.stat == FrameStat::row_max ||
                                    args.stat == FrameStat::frame_max);
  args.queries_per_block = queries_per_block(args, split);
  const int64_t blocks = divide_up(args.queries.tokens, args.queries_per_block);
  const int64_t items = args.batch * args.heads * blocks;

  std::vector<int64_t> rows;
  std::vector<float> sums;
  if (map.data) {
    rows = map_rows(args.queries, args.queries_per_block);
    args.map_rows = rows.data();
    args.map_rows_per_head = rows.back();
    sums.resize(static_cast<size_t>(args.batch * args.heads * rows.back() *
                                    (args.keys.frames + 1)));
    args.map_sums = sums.data();
  }

  // Blocks differ in how many keys they see: a thread takes the next one when it is done.
  const double operations = 4.0 * static_cast<double>(args.queries_per_block) *
                            static_cast<double>(args.keys.tokens) *
                            static_cast<double>(args.head_dim);
  std::atomic<int64_t> next{0};
  for_each_range(threads, items, operations, kernels.frames_scratch(args),
                 [&](int64_t, int64_t, float* scratch) {
                   for (int64_t item = next++; item < items; item = next++) {
                     kernels.frames_forward(args, item, scratch);
                   }
                 });
  if (map.data) add_up_map(args, map);
}

void run_frames_backward(FrameBackwardArgs& args, const FrameRuns& query_runs,
                         const FrameRuns& key_runs, const Threads& threads) {
  // So many items are enough for any number of threads, and few enough for their sums' memory.
  constexpr int64_t kItems = 8, kQueriesOfPart = 128;
  const Kernels& kernels = selected_kernels();
  const SortedCall sorted(args, query_runs, key_runs, args.grad_map != nullptr);
  const int64_t sequences = args.batch * args.key_heads;
  const int64_t most = divide_up(args.queries.tokens, kQueriesOfPart);
  args.parts = std::max<int64_t>(1, std::min(divide_up(kItems, sequences), most));
  const int64_t padded_dim = divide_up(args.head_dim, kernels.lanes) * kernels.lanes;
  const int64_t size = 2 * args.keys.tokens * padded_dim;
  std::vector<float> sums(static_cast<size_t>(sequences * args.parts * size));
  args.sums = sums.data();
  const double operations =
      10.0 * static_cast<double>(args.queries.tokens) * static_cast<double>(args.keys.tokens) *
      static_cast<double>(args.head_dim * args.heads / args.key_heads / args.parts);
  for_each_range(threads, sequences * args.parts, operations,
                 kernels.frames_backward_scratch(args),
                 [&](int64_t begin, int64_t end, float* scratch) {
                   for (int64_t item = begin; item < end; ++item) {
                     kernels.frames_backward(args, item, scratch);
                   }
                 });
  for_each_range(threads, sequences, static_cast<double>(size * args.parts), 0,
                 [&](int64_t begin, int64_t end, float*) {
                   for (int64_t sequence = begin; sequence < end; ++sequence) {
                     kernels.frames_backward_finish(args, sequence);
                   }
                 });
}

}  // namespace vstar
