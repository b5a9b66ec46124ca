// Registers the CPU kernels with PyTorch, through its stable C++ ABI. The schemas are Python's
// (vstar_kernels/ops.py); so are the arguments' checks that users see. Those here only keep a direct
// call of the operator inside its tensors.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <pthread.h>

#include <algorithm>
#include <memory>
#include <new>
#include <optional>

#include "dispatch.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// (batch, [space,] frames, heads, head_dim): the position of each in a tensor without `space` too.
struct Layout {
  bool has_space;
  int64_t frame, head;

  explicit Layout(int64_t dims) : has_space(dims == 5), frame(dims - 3), head(dims - 2) {}

  int64_t space_size(const Tensor& t) const { return has_space ? t.size(1) : 1; }
  vstar::Strides strides(const Tensor& t) const {
    return {t.stride(0), has_space ? t.stride(1) : 0, t.stride(frame), t.stride(head)};
  }
};

vstar::ScalarType scalar_type(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return vstar::ScalarType::float32;
    case ScalarType::BFloat16: return vstar::ScalarType::bfloat16;
    case ScalarType::Half: return vstar::ScalarType::float16;
    default: STD_TORCH_CHECK(false, "cpu_forward takes float32, bfloat16 and float16");
  }
}

void check_like(const Tensor& t, const Tensor& query, const char* name) {
  STD_TORCH_CHECK(t.dim() == query.dim() && t.scalar_type() == query.scalar_type() && t.is_cpu(),
                  "cpu_forward: ", name, " must have query's type and number of dimensions");
  for (int64_t d = 0; d < query.dim(); ++d) {
    STD_TORCH_CHECK(t.size(d) == query.size(d), "cpu_forward: ", name, " must have query's shape");
  }
  STD_TORCH_CHECK(t.size(t.dim() - 1) == 1 || t.stride(t.dim() - 1) == 1, "cpu_forward: ", name,
                  " must be contiguous in head_dim");
}

// Toeplitz tables are (1 or heads, 2L - 1) over i - j, dense biases (1 or heads, N, N) over (j, i),
// with i the query's frame and j the key's: the kernels take queries along their lanes.
void set_bias(vstar::ForwardArgs& args, const Tensor& bias) {
  STD_TORCH_CHECK(bias.scalar_type() == ScalarType::Float && bias.is_cpu() && bias.is_contiguous(),
                  "cpu_forward: bias must be a contiguous float32 tensor");
  const int64_t heads = bias.size(0), columns = bias.size(bias.dim() - 1);
  STD_TORCH_CHECK(heads == 1 || heads == args.heads, "cpu_forward: bias must have 1 or ",
                  args.heads, " heads, got ", heads);
  args.bias = bias.const_data_ptr<float>();
  if (bias.dim() == 2) {
    STD_TORCH_CHECK(columns % 2 == 1 && columns >= 2 * args.frames - 1,
                    "cpu_forward: the table must be odd in length and reach all frames");
    args.bias += columns / 2;
    args.bias_key_stride = -1;
    args.bias_head_stride = columns;
  } else {
    STD_TORCH_CHECK(bias.dim() == 3 && columns == args.frames && bias.size(1) == args.frames,
                    "cpu_forward: a dense bias must be (heads, frames, frames)");
    args.bias_key_stride = columns;
    args.bias_head_stride = columns * columns;
  }
  if (heads == 1) args.bias_head_stride = 0;
}

void set_stat(vstar::ForwardArgs& args, const Tensor& stat, const Tensor& query,
              const Layout& layout) {
  STD_TORCH_CHECK(stat.scalar_type() == ScalarType::Float && stat.dim() == query.dim() - 1,
                  "cpu_forward: stat_values must be float32, of query's shape without head_dim");
  for (int64_t d = 0; d < stat.dim(); ++d) {
    STD_TORCH_CHECK(stat.size(d) == query.size(d),
                    "cpu_forward: stat_values must be float32, of query's shape without head_dim");
  }
  args.stat_values = stat.const_data_ptr<float>();
  args.stat_strides = layout.strides(stat);
}

// Rows that a thread takes at once. Sequences are shared out whole while there are enough of them.
int64_t rows_per_item(int64_t sequences, int64_t frames) {
  constexpr int64_t kRows = 64;  // a multiple of every instruction set's panel
  const int64_t wanted = 8 * static_cast<int64_t>(torch::stable::get_num_threads());
  if (sequences >= wanted) return frames;
  const int64_t items = (wanted + sequences - 1) / sequences;
  const int64_t rows = (frames + items - 1) / items;
  return std::min(frames, (rows + kRows - 1) / kRows * kRows);
}

// OpenMP keeps a thread's team of helpers with that thread. A fork copies the thread that calls it
// but not the team, for which GNU's runtime would then wait for ever, as it does under torch's own
// operators: such a thread computes alone.
thread_local bool has_team = false, lost_team = false;
[[maybe_unused]] const int watching_forks =
    pthread_atfork(nullptr, nullptr, [] { lost_team = lost_team || has_team; });

template <typename Body>
void parallel_for(int64_t items, int64_t grain, const Body& body) {
  if (lost_team) return body(int64_t{0}, items);
  has_team = has_team || (items > grain && torch::stable::get_num_threads() > 1);
  torch::stable::parallel_for(0, items, grain, body);
}

struct FreeScratch {
  void operator()(float* p) const { ::operator delete[](p, std::align_val_t(64)); }
};

void cpu_forward(Tensor out, Tensor query, Tensor key, Tensor value, std::optional<Tensor> bias,
                 std::optional<Tensor> stat_values, double scale, double strength, int64_t stat,
                 bool clamp_negative) {
  STD_TORCH_CHECK(query.dim() == 4 || query.dim() == 5, "cpu_forward: query must be 4-D or 5-D");
  const Layout layout(query.dim());
  check_like(query, query, "query");
  check_like(key, query, "key");
  check_like(value, query, "value");
  check_like(out, query, "out");
  STD_TORCH_CHECK(stat >= 0 && stat <= 3, "cpu_forward: stat must be 0 to 3, got ", stat);

  vstar::ForwardArgs args = {};
  args.type = scalar_type(query);
  args.batch = query.size(0);
  args.space = layout.space_size(query);
  args.frames = query.size(layout.frame);
  args.heads = query.size(layout.head);
  args.head_dim = query.size(query.dim() - 1);
  const int64_t sequences = args.batch * args.space * args.heads;
  if (sequences == 0 || args.frames == 0 || args.head_dim == 0) return;

  args.query = query.const_data_ptr();
  args.key = key.const_data_ptr();
  args.value = value.const_data_ptr();
  args.out = out.mutable_data_ptr();
  args.query_strides = layout.strides(query);
  args.key_strides = layout.strides(key);
  args.value_strides = layout.strides(value);
  args.out_strides = layout.strides(out);
  args.scale = static_cast<float>(scale);
  args.strength = static_cast<float>(strength);
  args.stat = static_cast<vstar::Stat>(stat);
  args.clamp_negative = clamp_negative;
  if (bias) set_bias(args, *bias);
  if (stat_values) set_stat(args, *stat_values, query, layout);
  STD_TORCH_CHECK((args.stat == vstar::Stat::tensor) == (args.stat_values != nullptr),
                  "cpu_forward: stat 3 goes with stat_values");
  args.rows_per_item = rows_per_item(sequences, args.frames);

  const vstar::Kernels& kernels = vstar::selected_kernels();
  const int64_t items = (args.frames + args.rows_per_item - 1) / args.rows_per_item;
  // A thread is worth waking for a million operations, some 10 microseconds.
  const double operations = 4.0 * args.rows_per_item * args.frames * args.head_dim;
  const int64_t grain = std::max<int64_t>(1, static_cast<int64_t>(1e6 / operations));
  const auto scratch_floats = static_cast<size_t>(kernels.forward_scratch(args));
  parallel_for(sequences * items, grain, [&](int64_t first, int64_t last) {
    const std::unique_ptr<float[], FreeScratch> scratch(static_cast<float*>(
        ::operator new[](scratch_floats * sizeof(float), std::align_val_t(64))));
    kernels.forward(args, first, last, scratch.get());
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vstar_kernels, CPU, m) { m.impl("cpu_forward", TORCH_BOX(&cpu_forward)); }
