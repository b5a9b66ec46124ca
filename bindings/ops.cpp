// Registers the CPU kernels with PyTorch, through its stable C++ ABI. The schemas are Python's
// (vstar_kernels/attention/schemas.py); so are the arguments' checks that users see. Those here only keep a direct
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
#include "groups.h"

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
    default: STD_TORCH_CHECK(false, "the kernels take float32, bfloat16 and float16");
  }
}

// Of the last dimension; 1 where it means nothing.
int64_t dim_stride(const Tensor& t) {
  return t.size(t.dim() - 1) == 1 ? 1 : t.stride(t.dim() - 1);
}

bool has_shape(const Tensor& t, const Tensor& of, int64_t dims) {
  if (t.dim() != dims) return false;
  for (int64_t d = 0; d < dims; ++d) {
    if (t.size(d) != of.size(d)) return false;
  }
  return true;
}

void check_like_but_strides(const Tensor& t, const Tensor& query, const char* name) {
  STD_TORCH_CHECK(t.dim() == query.dim() && t.scalar_type() == query.scalar_type() && t.is_cpu(),
                  name, " must have query's type and number of dimensions");
  STD_TORCH_CHECK(has_shape(t, query, query.dim()), name, " must have query's shape");
}

void check_like(const Tensor& t, const Tensor& query, const char* name) {
  check_like_but_strides(t, query, name);
  STD_TORCH_CHECK(dim_stride(t) == 1, name, " must be contiguous in head_dim");
}

void check_contiguous(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.is_cpu() && t.is_contiguous(), name,
                  " must be a contiguous float32 tensor");
}

void check_map(const Tensor& map, const Tensor& query, const Layout& layout, const char* name) {
  const int64_t frames = query.size(layout.frame);
  check_contiguous(map, name);
  STD_TORCH_CHECK(map.dim() == 3 && map.size(0) == query.size(0) && map.size(1) == frames &&
                      map.size(2) == frames,
                  name, " must be (batch, frames, frames)");
}

void check_stat(const Tensor& stat, const Tensor& query, const char* name) {
  STD_TORCH_CHECK(stat.scalar_type() == ScalarType::Float && stat.is_cpu() &&
                      has_shape(stat, query, query.dim() - 1),
                  name, " must be float32, of query's shape without head_dim");
}

// Toeplitz tables are (1 or heads, 2L - 1) over i - j, dense biases (1 or heads, N, N) over (j, i),
// with i the query's frame and j the key's: the kernels take queries along their lanes.
void set_bias(vstar::Problem& problem, const Tensor& bias) {
  check_contiguous(bias, "bias");
  const int64_t heads = bias.size(0), columns = bias.size(bias.dim() - 1);
  STD_TORCH_CHECK(heads == 1 || heads == problem.heads, "bias must have 1 or ", problem.heads,
                  " heads, got ", heads);
  problem.bias = bias.const_data_ptr<float>();
  if (bias.dim() == 2) {
    STD_TORCH_CHECK(columns % 2 == 1 && columns >= 2 * problem.frames - 1,
                    "the table must be odd in length and reach all frames");
    problem.bias += columns / 2;
    problem.bias_key_stride = -1;
    problem.bias_head_stride = columns;
  } else {
    STD_TORCH_CHECK(
        bias.dim() == 3 && columns == problem.frames && bias.size(1) == problem.frames,
        "a dense bias must be (heads, frames, frames)");
    problem.bias_key_stride = columns;
    problem.bias_head_stride = columns * columns;
  }
  if (heads == 1) problem.bias_head_stride = 0;
}

// What both operators are asked, in their order of arguments.
struct Question {
  const Tensor& query;
  const Tensor& key;
  const Tensor& value;
  const std::optional<Tensor>& bias;
  const std::optional<Tensor>& stat_values;
  double scale, strength;
  int64_t stat;
  bool clamp_negative;

  Layout check() const {
    STD_TORCH_CHECK(query.dim() == 4 || query.dim() == 5, "query must be 4-D or 5-D");
    check_like(query, query, "query");
    check_like(key, query, "key");
    check_like(value, query, "value");
    STD_TORCH_CHECK(stat >= 0 && stat <= 3, "stat must be 0 to 3, got ", stat);
    STD_TORCH_CHECK((static_cast<vstar::Stat>(stat) == vstar::Stat::tensor) ==
                        stat_values.has_value(),
                    "stat 3 goes with stat_values");
    if (stat_values) check_stat(*stat_values, query, "stat_values");
    return Layout(query.dim());
  }

  void set(vstar::Problem& problem, const Layout& layout) const {
    problem.type = scalar_type(query);
    problem.batch = query.size(0);
    problem.space = layout.space_size(query);
    problem.frames = query.size(layout.frame);
    problem.heads = query.size(layout.head);
    problem.head_dim = query.size(query.dim() - 1);
    problem.query = query.const_data_ptr();
    problem.key = key.const_data_ptr();
    problem.value = value.const_data_ptr();
    problem.query_strides = layout.strides(query);
    problem.key_strides = layout.strides(key);
    problem.value_strides = layout.strides(value);
    problem.scale = static_cast<float>(scale);
    problem.strength = static_cast<float>(strength);
    problem.stat = static_cast<vstar::Stat>(stat);
    problem.clamp_negative = clamp_negative;
    if (bias) set_bias(problem, *bias);
    if (stat_values) {
      problem.stat_values = stat_values->const_data_ptr<float>();
      problem.stat_strides = layout.strides(*stat_values);
    }
  }
};

int64_t sequences(const vstar::Problem& p) { return p.batch * p.space * p.heads; }
// Of one product of N x N x D, over all sequences.
double product_operations(const vstar::Problem& p) {
  return 2.0 * sequences(p) * p.frames * p.frames * p.head_dim;
}
bool is_empty(const vstar::Problem& p) {
  return sequences(p) == 0 || p.frames == 0 || p.head_dim == 0;
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

// A thread is worth waking for a million operations, some 10 microseconds.
int64_t items_per_thread(double operations_of_item) {
  return std::max<int64_t>(1, static_cast<int64_t>(1e6 / operations_of_item));
}

using Floats = std::unique_ptr<float[], FreeScratch>;

Floats allocate(int64_t floats) {
  return Floats(static_cast<float*>(
      ::operator new[](static_cast<size_t>(floats) * sizeof(float), std::align_val_t(64))));
}

// body(task, scratch) for all tasks, in any number of threads, each with a scratch of its own.
template <typename Body>
void for_each_task(int64_t tasks, double operations, int64_t scratch_floats, const Body& body) {
  const int64_t grain = items_per_thread(operations / static_cast<double>(tasks));
  parallel_for(tasks, grain, [&](int64_t first, int64_t last) {
    const Floats scratch = allocate(scratch_floats);
    for (int64_t task = first; task < last; ++task) body(task, scratch.get());
  });
}

void forward(vstar::ForwardArgs& args) {
  const vstar::Kernels& kernels = vstar::selected_kernels();
  args.rows_per_item = rows_per_item(sequences(args), args.frames);
  const int64_t items = (args.frames + args.rows_per_item - 1) / args.rows_per_item;
  const int64_t grain = items_per_thread(4.0 * args.rows_per_item * args.frames * args.head_dim);
  const int64_t scratch_floats = kernels.forward_scratch(args);
  parallel_for(sequences(args) * items, grain, [&](int64_t first, int64_t last) {
    const Floats scratch = allocate(scratch_floats);
    kernels.forward(args, first, last, scratch.get());
  });
}

void forward_with_map(vstar::ForwardArgs& args, float* map) {
  const vstar::Kernels& kernels = vstar::selected_kernels();
  const vstar::MapTasks tasks(args);
  const Floats partials = allocate(tasks.partial_floats());
  for_each_task(tasks.count(), 2 * product_operations(args), kernels.forward_scratch(args),
                [&](int64_t task, float* scratch) {
                  tasks.run(kernels, task, map, partials.get(), scratch);
                });
  tasks.finish(partials.get(), map);
}

void cpu_forward(Tensor out, std::optional<Tensor> map, Tensor query, Tensor key, Tensor value,
                 std::optional<Tensor> bias, std::optional<Tensor> stat_values, double scale,
                 double strength, int64_t stat, bool clamp_negative) {
  const Question question = {query, key,      value, bias,          stat_values,
                             scale, strength, stat,  clamp_negative};
  const Layout layout = question.check();
  check_like(out, query, "out");
  if (map) check_map(*map, query, layout, "map");
  vstar::ForwardArgs args = {};
  question.set(args, layout);
  if (is_empty(args)) {
    if (map) torch::stable::fill_(*map, __builtin_nan(""));  // the mean of nothing
    return;
  }
  args.out = out.mutable_data_ptr();
  args.out_strides = layout.strides(out);
  if (map) {
    forward_with_map(args, map->mutable_data_ptr<float>());
  } else {
    forward(args);
  }
}

void backward(const vstar::BackwardArgs& args) {
  const vstar::Kernels& kernels = vstar::selected_kernels();
  const int64_t grain = items_per_thread(5 * product_operations(args) / sequences(args));
  const int64_t scratch_floats = kernels.backward_scratch(args);
  parallel_for(sequences(args), grain, [&](int64_t first, int64_t last) {
    const Floats scratch = allocate(scratch_floats);
    kernels.backward(args, first, last, scratch.get());
  });
}

void backward_with_bias(const vstar::BackwardArgs& args, const Tensor& grad_bias) {
  const vstar::Kernels& kernels = vstar::selected_kernels();
  const vstar::BiasTasks tasks(kernels, args, grad_bias.size(0),
                               grad_bias.size(grad_bias.dim() - 1));
  const Floats partials = allocate(tasks.partial_floats());
  for_each_task(tasks.count(), 5 * product_operations(args),
                tasks.scratch_floats() + kernels.backward_scratch(args),
                [&](int64_t task, float* scratch) { tasks.run(task, partials.get(), scratch); });
  tasks.finish(partials.get(), grad_bias.mutable_data_ptr<float>());
}

void cpu_backward(Tensor grad_query, Tensor grad_key, Tensor grad_value,
                  std::optional<Tensor> grad_bias, std::optional<Tensor> grad_stat,
                  Tensor grad_out, std::optional<Tensor> grad_map, Tensor query, Tensor key,
                  Tensor value, std::optional<Tensor> bias, std::optional<Tensor> stat_values,
                  double scale, double strength, int64_t stat, bool clamp_negative,
                  bool detach_stat) {
  const Question question = {query, key,      value, bias,          stat_values,
                             scale, strength, stat,  clamp_negative};
  const Layout layout = question.check();
  check_like(grad_query, query, "grad_query");
  check_like(grad_key, query, "grad_key");
  check_like(grad_value, query, "grad_value");
  check_like_but_strides(grad_out, query, "grad_out");
  if (grad_map) check_map(*grad_map, query, layout, "grad_map");
  if (grad_bias) {
    check_contiguous(*grad_bias, "grad_bias");
    STD_TORCH_CHECK(bias && grad_bias->dim() == bias->dim() &&
                        has_shape(*grad_bias, *bias, bias->dim()),
                    "grad_bias must have bias's shape");
  }
  if (grad_stat) {
    STD_TORCH_CHECK(stat_values.has_value(), "grad_stat goes with stat_values");
    check_stat(*grad_stat, query, "grad_stat");
  }

  vstar::BackwardArgs args = {};
  question.set(args, layout);
  // The kernels write the gradients that there are.
  if (grad_bias && is_empty(args)) torch::stable::zero_(*grad_bias);
  if (grad_stat && (!bias || detach_stat || is_empty(args))) torch::stable::zero_(*grad_stat);
  if (is_empty(args)) return;

  args.detach_stat = detach_stat;
  args.grad_out = grad_out.const_data_ptr();
  args.grad_out_strides = layout.strides(grad_out);
  args.grad_out_dim_stride = dim_stride(grad_out);
  if (grad_map) args.grad_map = grad_map->const_data_ptr<float>();
  args.grad_query = grad_query.mutable_data_ptr();
  args.grad_key = grad_key.mutable_data_ptr();
  args.grad_value = grad_value.mutable_data_ptr();
  args.grad_query_strides = layout.strides(grad_query);
  args.grad_key_strides = layout.strides(grad_key);
  args.grad_value_strides = layout.strides(grad_value);
  if (grad_stat) {
    args.grad_stat = grad_stat->mutable_data_ptr<float>();
    args.grad_stat_strides = layout.strides(*grad_stat);
  }
  if (grad_bias) {
    backward_with_bias(args, *grad_bias);
  } else {
    backward(args);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vstar_kernels, CPU, m) {
  m.impl("cpu_forward", TORCH_BOX(&cpu_forward));
  m.impl("cpu_backward", TORCH_BOX(&cpu_backward));
}
