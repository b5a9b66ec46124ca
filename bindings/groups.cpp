#include "groups.h"

#include <algorithm>

namespace vstar {
namespace {

// Enough for any number of cores, few enough that adding them up costs nothing.
constexpr int64_t kGroups = 64;
constexpr int64_t kMaxPartialFloats = int64_t{1} << 24;
// A long running sum would lose a bit for every fourfold of its length, so a group is added up in
// runs.
constexpr int64_t kRun = 64;
// A map's rows that are summed up at once, so that the sums stay in the caches.
constexpr int64_t kMapRows = 256;

int64_t groups(int64_t wanted, int64_t floats, int64_t sequences) {
  const int64_t most = std::min(kMaxPartialFloats / floats, sequences);
  return std::max<int64_t>(1, std::min(wanted, most));
}

void add(const float* terms, int64_t count, float* sums) {
  for (int64_t i = 0; i < count; ++i) sums[i] += terms[i];
}

}  // namespace

MapTasks::MapTasks(ForwardArgs& args) : args_(args) {
  args.wants_map = true;
  args.rows_per_item = std::min(args.frames, kMapRows);
  chunks_ = (args.frames + args.rows_per_item - 1) / args.rows_per_item;
  groups_ = groups((kGroups + args.batch - 1) / args.batch,
                   args.batch * args.frames * args.frames, sequences());
}

int64_t MapTasks::partial_floats() const {
  return groups_ == 1 ? 0 : args_.batch * groups_ * args_.frames * args_.frames;
}

void MapTasks::run(const Kernels& kernels, int64_t task, float* map, float* partials,
                   float* scratch) const {
  const int64_t chunk = task % chunks_;
  const int64_t group_index = task / chunks_;  // of all batch elements
  const int64_t batch = group_index / groups_, group = group_index % groups_;
  MapPart part = {};
  part.first_row = chunk * args_.rows_per_item;
  part.last_row = std::min(part.first_row + args_.rows_per_item, args_.frames);
  part.map = (groups_ == 1 ? map : partials) + group_index * args_.frames * args_.frames;
  part.last_sequence = batch * sequences() + group * sequences() / groups_;
  const int64_t end = batch * sequences() + (group + 1) * sequences() / groups_;
  while (part.last_sequence < end) {
    part.first_sequence = part.last_sequence;
    part.last_sequence = std::min(part.first_sequence + kRun, end);
    kernels.forward_map(args_, part, scratch);
    part.add = true;
  }
}

void MapTasks::finish(const float* partials, float* map) const {
  if (groups_ == 1) return;
  const int64_t size = args_.frames * args_.frames;
  for (int64_t batch = 0; batch < args_.batch; ++batch, map += size) {
    std::fill(map, map + size, 0.0f);
    for (int64_t group = 0; group < groups_; ++group, partials += size) add(partials, size, map);
  }
}

BiasTasks::BiasTasks(const Kernels& kernels, const BackwardArgs& args, int64_t heads,
                     int64_t columns)
    : kernels_(kernels), args_(args), heads_(heads), columns_(columns), layout_() {
  const int64_t lanes = kernels.lanes, padded = (args.frames + lanes - 1) / lanes * lanes;
  origin_ = is_table() ? padded : 0;
  layout_.block_stride = is_table() ? -1 : padded;
  layout_.key_stride = is_table() ? 2 * padded : padded;
  const int64_t of_head = is_table() ? lanes * layout_.key_stride : args.frames * padded;
  layout_.head_stride = heads > 1 ? of_head : 0;
  size_ = heads * of_head;
  groups_ = groups(kGroups, size_, args.batch * args.space * args.heads);
}

void BiasTasks::run(int64_t task, float* partials, float* scratch) const {
  const int64_t sequences = args_.batch * args_.space * args_.heads;
  const int64_t end = (task + 1) * sequences / groups_;
  float* const group = partials + task * size_;
  float* const run = scratch;
  BackwardArgs args = args_;
  args.bias_sums = layout_;
  bool first_run = true;
  for (int64_t first = task * sequences / groups_; first < end; first += kRun) {
    float* sums = first_run ? group : run;
    std::fill(sums, sums + size_, 0.0f);
    args.bias_sums.data = sums + origin_;
    kernels_.backward(args, first, std::min(first + kRun, end), scratch + size_);
    if (!first_run) add(run, size_, group);
    first_run = false;
  }
}

void BiasTasks::finish(float* partials, float* grad_bias) const {
  for (int64_t group = 1; group < groups_; ++group) {
    add(partials + group * size_, size_, partials);
  }
  const int64_t head_size = is_table() ? columns_ : columns_ * columns_;
  for (int64_t head = 0; head < heads_; ++head) {
    const float* sums = partials + head * layout_.head_stride;
    float* grad = grad_bias + head * head_size;
    if (is_table()) {
      fold_table(sums, grad);
    } else {
      for (int64_t j = 0; j < columns_; ++j) {
        std::copy_n(sums + j * layout_.key_stride, columns_, grad + j * columns_);
      }
    }
  }
}

// Adds up the copies of a table, one for each remainder of a key against the lanes.
void BiasTasks::fold_table(const float* sums, float* grad) const {
  std::fill(grad, grad + columns_, 0.0f);
  for (int64_t distance = 1 - args_.frames; distance < args_.frames; ++distance) {
    double sum = 0;
    for (int64_t j = 0; j < kernels_.lanes; ++j) {
      const int64_t cell = origin_ + distance + j;
      if (cell < layout_.key_stride) sum += sums[j * layout_.key_stride + cell];
    }
    grad[columns_ / 2 + distance] = static_cast<float>(sum);
  }
}

}  // namespace vstar
