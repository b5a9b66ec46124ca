#include "sums.h"

#include <algorithm>

namespace vstar {
namespace {

// So many groups are enough for any number of cores, and few enough to be added up for nothing.
constexpr int64_t kGroups = 64;
// How much memory their sums may take: 16 MiB for a map, 64 MiB for Δ's gradient.
constexpr int64_t kMaxMapFloats = int64_t{1} << 22, kMaxDeltaFloats = int64_t{1} << 24;
// A long running sum would lose a bit for every fourfold of its length, so a group is added up in
// runs.
constexpr int64_t kRun = 64;
// How many queries' rows of a map are summed up at once, so that the sums stay in the caches.
constexpr int64_t kMapQueries = 256;

int64_t divide_up(int64_t x, int64_t divisor) { return (x + divisor - 1) / divisor; }

// Returns into how many groups of sums, of this many floats each, the sequences are cut.
int64_t groups(int64_t wanted, int64_t floats, int64_t max_floats, int64_t sequences) {
  const int64_t most = std::min(max_floats / floats, sequences);
  return std::max<int64_t>(1, std::min(wanted, most));
}

void add(const float* terms, int64_t count, float* sums) {
  for (int64_t i = 0; i < count; ++i) sums[i] += terms[i];
}

}  // namespace

MapTasks::MapTasks(ForwardArgs& args) : args_(args) {
  parts_ = divide_up(args.map_block, kMapQueries);
  const int64_t blocks_at_once = std::max<int64_t>(1, kMapQueries / args.map_block);
  args.queries_per_item =
      std::min(args.frames, divide_up(blocks_at_once * args.map_block, parts_));
  chunks_ = divide_up(args.map_blocks, blocks_at_once) * parts_;
  groups_ = groups(divide_up(kGroups, maps()), maps() * group_size(), kMaxMapFloats, sequences());
}

int64_t MapTasks::group_floats() const {
  return groups_ == 1 && parts_ == 1 ? 0 : maps() * groups_ * group_size();
}

int64_t MapTasks::sequence(int64_t map, int64_t n) const {
  const int64_t of_batch = args_.space * args_.heads, heads = args_.map_heads;
  return map / heads * of_batch + n * heads + map % heads;
}

void MapTasks::run(const Kernels& kernels, int64_t task, float* maps, float* group_sums,
                   float* scratch) const {
  const int64_t chunk = task % chunks_;
  const int64_t group_index = task / chunks_;  // of all maps
  const int64_t map = group_index / groups_, group = group_index % groups_;
  const int64_t blocks_at_once = std::max<int64_t>(1, kMapQueries / args_.map_block);
  const int64_t block = chunk / parts_ * blocks_at_once, part = chunk % parts_;
  const int64_t block_end = (block + blocks_at_once) * args_.map_block;
  MapSlice slice = {};
  slice.query_begin = block * args_.map_block + part * args_.queries_per_item;
  slice.query_end = std::min({slice.query_begin + args_.queries_per_item, block_end, args_.frames});
  slice.map = (group_floats() == 0 ? maps : group_sums) + group_index * group_size() +
              (block * parts_ + part) * args_.map_blocks;
  if (slice.query_begin >= slice.query_end) {  // of a last block with fewer frames
    std::fill(slice.map, slice.map + args_.map_blocks, 0.0f);
    return;
  }
  const int64_t end = (group + 1) * sequences() / groups_;
  for (int64_t n = group * sequences() / groups_; n < end; n += kRun) {
    slice.sequence_begin = sequence(map, n);
    slice.sequence_end = sequence(map, std::min(n + kRun, end));
    kernels.forward_map(args_, slice, scratch);
    slice.accumulate = true;
  }
}

void MapTasks::finish(const float* group_sums, float* out) const {
  if (group_floats() == 0) return;
  const int64_t blocks = args_.map_blocks, size = blocks * blocks;
  for (float* map = out; map < out + maps() * size; map += size) {
    std::fill(map, map + size, 0.0f);
    for (int64_t group = 0; group < groups_; ++group) {
      for (int64_t row = 0; row < blocks * parts_; ++row, group_sums += blocks) {
        add(group_sums, blocks, map + row / parts_ * blocks);
      }
    }
  }
}

DeltaTasks::DeltaTasks(const Kernels& kernels, const BackwardArgs& args, const UserDelta& delta)
    : kernels_(kernels), args_(args), grad_(delta), layout_() {
  grad_.stride = 1;
  const int64_t lanes = kernels.lanes, padded = (args.frames + lanes - 1) / lanes * lanes;
  const bool is_table = delta.is_table();
  origin_ = is_table ? padded : 0;
  layout_.block_stride = is_table ? -1 : padded;
  layout_.key_stride = is_table ? 2 * padded : padded;
  const int64_t head_size = is_table ? lanes * layout_.key_stride : args.frames * padded;
  layout_.head_stride = delta.heads > 1 ? head_size : 0;
  size_ = delta.heads * head_size;
  items_ = args.batch * args.space * args.heads * args.parts;
  groups_ = groups(kGroups, size_, kMaxDeltaFloats, items_);
}

void DeltaTasks::run(int64_t task, float* group_sums, float* scratch) const {
  const int64_t end = (task + 1) * items_ / groups_;
  float* const sums_of_group = group_sums + task * size_;
  float* const sums_of_run = scratch;
  BackwardArgs args = args_;
  args.delta_sums = layout_;
  bool is_first_run = true;
  for (int64_t begin = task * items_ / groups_; begin < end; begin += kRun) {
    float* sums = is_first_run ? sums_of_group : sums_of_run;
    std::fill(sums, sums + size_, 0.0f);
    args.delta_sums.data = sums + origin_;
    kernels_.backward(args, begin, std::min(begin + kRun, end), scratch + size_);
    if (!is_first_run) add(sums_of_run, size_, sums_of_group);
    is_first_run = false;
  }
}

void DeltaTasks::finish(float* group_sums, float* grad_delta) const {
  for (int64_t group = 1; group < groups_; ++group) {
    add(group_sums + group * size_, size_, group_sums);
  }
  const int64_t head_size = grad_.is_table() ? grad_.length : grad_.length * grad_.length;
  for (int64_t head = 0; head < grad_.heads; ++head) {
    float* sums = group_sums + head * layout_.head_stride;
    float* grad = grad_delta + head * head_size;
    if (grad_.is_table()) {
      add_up_copies(sums);
      write_table_gradient(grad_, sums + origin_, args_.frames, grad);
    } else {
      write_matrix_gradient(sums, layout_.key_stride, args_.frames, grad);
    }
  }
}

// Adds the copies of one head's table, one for each remainder of a key against the lanes, up into
// the first.
void DeltaTasks::add_up_copies(float* sums) const {
  for (int64_t distance = 1 - args_.frames; distance < args_.frames; ++distance) {
    double sum = 0;
    for (int64_t j = 0; j < kernels_.lanes; ++j) {
      const int64_t cell = origin_ + distance + j;
      if (cell < layout_.key_stride) sum += sums[j * layout_.key_stride + cell];
    }
    sums[origin_ + distance] = static_cast<float>(sum);
  }
}

}  // namespace vstar
