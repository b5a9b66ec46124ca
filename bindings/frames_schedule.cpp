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
    for (int64_t r = 0; r < runs.count; ++r) {
      const FrameRun& run = runs.runs[r];
      int32_t* place = order.data() + begin[frame_of(run)] + run.index;
      for (int32_t token = run.start; token < run.end; ++token) *place++ = token;
    }
    view = {tokens, runs.frames, order.data(), begin.data()};
  }
};

int64_t divide_up(int64_t x, int64_t divisor) { return (x + divisor - 1) / divisor; }

// Returns how many queries go over the keys together. The more, the less often keys are packed, but
// a block's accumulators are to stay in the second cache, and blocks are to be enough for many
// threads. The number depends on the call alone, not on the threads.
int64_t queries_per_block(const FrameArgs& a, bool split) {
  constexpr int64_t kMost = 256, kFewest = 64, kItems = 64;
  constexpr int64_t kCacheBytes = 640 << 10, kMostBytes = 5 << 19;
  const int64_t accumulators = split ? a.keys.frames + 1 : 1;
  const int64_t row_bytes = accumulators * ((a.head_dim + 15) / 16 * 16) * 4;
  int64_t queries = kMost;
  while (queries > kFewest && (queries * row_bytes > kCacheBytes ||
                               a.batch * a.heads * divide_up(a.queries.tokens, queries) < kItems)) {
    queries /= 2;
  }
  while (queries > 16 && queries * row_bytes > kMostBytes) queries /= 2;
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
    if (run.index != place) return false;
    place += run.end - run.start;
    token = run.end;
  }
  // Each frame has a token.
  return token == tokens && std::find(places.begin(), places.end() - 1, 0) == places.end() - 1;
}

void run_frames_forward(FrameArgs& args, const FrameRuns& query_runs, const FrameRuns& key_runs,
                        const FrameMap& map, const Threads& threads) {
  const Kernels& kernels = selected_kernels();
  const bool has_rule = args.delta || args.offset || args.factor || args.band;
  // Where frames make no difference, all tokens are alike.
  const auto whole = [](int64_t tokens) {
    return FrameRun{0, static_cast<int32_t>(tokens), -1, 0};
  };
  const FrameRun all_queries = whole(args.queries.tokens), all_keys = whole(args.keys.tokens);
  const bool is_plain = !has_rule && !map.data;
  const SortedTokens queries(is_plain ? FrameRuns{&all_queries, 1, 0} : query_runs,
                             args.queries.tokens);
  const SortedTokens keys(is_plain ? FrameRuns{&all_keys, 1, 0} : key_runs, args.keys.tokens);
  args.queries = queries.view;
  args.keys = keys.view;
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

}  // namespace vstar
