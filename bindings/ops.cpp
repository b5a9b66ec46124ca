// Registers the CPU kernels with PyTorch, through its stable C++ ABI. The schemas are Python's
// (vstar_kernels/attention/native.py); so are the arguments' checks that users see. Those here only
// keep a direct call of an operator inside its tensors.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "schedule.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Where the dimensions of (batch, [space,] frames, heads, head_dim) are, with or without `space`.
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

// Returns the last dimension's stride; 1 where it means nothing.
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

void check_float(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.is_cpu(), name,
                  " must be a float32 tensor on the CPU");
}

void check_contiguous(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.is_cpu() && t.is_contiguous(), name,
                  " must be a contiguous float32 tensor");
}

// Returns in how many blocks the frames of a map are that has passed the checks.
int64_t check_map(const Tensor& map, const Tensor& query, const Layout& layout, int64_t block,
                  const char* name) {
  const int64_t frames = query.size(layout.frame);
  STD_TORCH_CHECK(block >= 1 && (block <= frames || block == 1),
                  "map_block must be 1 to ", frames, ", got ", block);
  const int64_t blocks = (frames + block - 1) / block;
  check_contiguous(map, name);
  STD_TORCH_CHECK(map.dim() == 3 && map.size(0) == query.size(0) && map.size(1) == blocks &&
                      map.size(2) == blocks,
                  name, " must be (batch, blocks, blocks), blocks of map_block frames");
  return blocks;
}

void check_stat(const Tensor& stat, const Tensor& query, const char* name) {
  check_float(stat, name);
  STD_TORCH_CHECK(has_shape(stat, query, query.dim() - 1), name,
                  " must be of query's shape without head_dim");
}

// Returns Δ as delta.h describes its forms. Its gradient has the same shape.
vstar::UserDelta user_delta(const Tensor& delta, vstar::Form form, const vstar::Problem& problem) {
  check_float(delta, "delta");
  const bool is_table = form != vstar::Form::dense;
  const int64_t dims = delta.dim(), own_dims = is_table ? 1 : 2;
  STD_TORCH_CHECK(dims == own_dims || dims == own_dims + 1, "delta must be ",
                  is_table ? "a table, of 1 or 2" : "a matrix, of 2 or 3",
                  " dimensions, got ", dims);
  vstar::UserDelta result = {};
  result.form = form;
  result.data = delta.const_data_ptr<float>();
  result.heads = dims == own_dims ? 1 : delta.size(0);
  result.length = delta.size(dims - 1);
  result.head_stride = dims == own_dims ? 0 : delta.stride(0);
  result.row_stride = is_table ? 0 : delta.stride(dims - 2);
  result.stride = delta.stride(dims - 1);
  STD_TORCH_CHECK(result.heads == 1 || result.heads == problem.heads, "delta must have 1 or ",
                  problem.heads, " heads, got ", result.heads);
  if (!is_table) {
    STD_TORCH_CHECK(result.length == problem.frames && delta.size(dims - 2) == problem.frames,
                    "a dense delta must be (frames, frames) or (heads, frames, frames)");
  } else if (form == vstar::Form::symmetric) {
    STD_TORCH_CHECK(result.length >= problem.frames, "the table must reach all frames");
  } else {
    STD_TORCH_CHECK(result.length % 2 == 1 && result.length >= 2 * problem.frames - 1,
                    "the table must be odd in length and reach all frames");
  }
  return result;
}

// The arguments that both operators take, in their order.
struct Arguments {
  const Tensor& query;
  const Tensor& key;
  const Tensor& value;
  const std::optional<Tensor>& delta;
  const std::optional<Tensor>& stat_tensor;
  int64_t form;
  double strength;
  int64_t stat;
  bool clamp_negative;
  double scale;

  Layout check() const {
    STD_TORCH_CHECK(query.dim() == 4 || query.dim() == 5, "query must be 4-D or 5-D");
    check_like(query, query, "query");
    check_like(key, query, "key");
    check_like(value, query, "value");
    STD_TORCH_CHECK(form >= 0 && form <= 4, "form must be 0 to 4, got ", form);
    STD_TORCH_CHECK((static_cast<vstar::Form>(form) != vstar::Form::none) == delta.has_value(),
                    "form 1 to 4 goes with delta");
    STD_TORCH_CHECK(stat >= 0 && stat <= 3, "stat must be 0 to 3, got ", stat);
    STD_TORCH_CHECK((static_cast<vstar::Stat>(stat) == vstar::Stat::tensor) ==
                        stat_tensor.has_value(),
                    "stat 3 goes with stat_tensor");
    if (stat_tensor) check_stat(*stat_tensor, query, "stat_tensor");
    return Layout(query.dim());
  }

  // Sets all of the problem but Δ, and returns Δ.
  vstar::UserDelta set(vstar::Problem& problem, const Layout& layout) const {
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
    if (stat_tensor) {
      problem.stat_tensor = stat_tensor->const_data_ptr<float>();
      problem.stat_strides = layout.strides(*stat_tensor);
    }
    if (!delta) return {};
    return user_delta(*delta, static_cast<vstar::Form>(form), problem);
  }
};

vstar::Threads threads() {
  return {torch::stable::get_num_threads(),
          [](int64_t items, int64_t grain, const vstar::RangeBody& body) {
            torch::stable::parallel_for(0, items, grain, body);
          }};
}

void cpu_forward(Tensor out, std::optional<Tensor> map, Tensor query, Tensor key, Tensor value,
                 std::optional<Tensor> delta, std::optional<Tensor> stat_tensor, int64_t form,
                 double strength, int64_t stat, bool clamp_negative, double scale,
                 int64_t map_block) {
  const Arguments arguments = {query, key,      value, delta,          stat_tensor,
                               form,  strength, stat,  clamp_negative, scale};
  const Layout layout = arguments.check();
  check_like(out, query, "out");
  vstar::ForwardArgs args = {};
  if (map) {
    args.map_blocks = check_map(*map, query, layout, map_block, "map");
    args.map_block = map_block;
  }
  const vstar::UserDelta user_delta = arguments.set(args, layout);
  if (vstar::is_empty(args)) {
    if (map) torch::stable::fill_(*map, __builtin_nan(""));  // the mean of nothing
    return;
  }
  args.out = out.mutable_data_ptr();
  args.out_strides = layout.strides(out);
  vstar::run_forward(args, user_delta, map ? map->mutable_data_ptr<float>() : nullptr, threads());
}

void cpu_backward(Tensor grad_query, Tensor grad_key, Tensor grad_value,
                  std::optional<Tensor> grad_delta, std::optional<Tensor> grad_stat,
                  Tensor grad_out, std::optional<Tensor> grad_map, Tensor query, Tensor key,
                  Tensor value, std::optional<Tensor> delta, std::optional<Tensor> stat_tensor,
                  int64_t form, double strength, int64_t stat, bool clamp_negative,
                  bool detach_stat, double scale, int64_t map_block) {
  const Arguments arguments = {query, key,      value, delta,          stat_tensor,
                               form,  strength, stat,  clamp_negative, scale};
  const Layout layout = arguments.check();
  check_like(grad_query, query, "grad_query");
  check_like(grad_key, query, "grad_key");
  check_like(grad_value, query, "grad_value");
  check_like_but_strides(grad_out, query, "grad_out");
  vstar::BackwardArgs args = {};
  if (grad_map) {
    args.map_blocks = check_map(*grad_map, query, layout, map_block, "grad_map");
    args.map_block = map_block;
  }
  if (grad_delta) {
    check_contiguous(*grad_delta, "grad_delta");
    STD_TORCH_CHECK(delta && has_shape(*grad_delta, *delta, delta->dim()),
                    "grad_delta must have delta's shape");
  }
  if (grad_stat) {
    STD_TORCH_CHECK(stat_tensor.has_value(), "grad_stat goes with stat_tensor");
    check_stat(*grad_stat, query, "grad_stat");
  }

  const vstar::UserDelta user_delta = arguments.set(args, layout);
  // The kernels write the gradients that there are.
  const bool is_empty = vstar::is_empty(args);
  if (grad_stat && (!delta || detach_stat || is_empty)) torch::stable::zero_(*grad_stat);
  if (grad_delta && is_empty) torch::stable::zero_(*grad_delta);
  if (is_empty) return;

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
  vstar::run_backward(args, user_delta,
                      grad_delta ? grad_delta->mutable_data_ptr<float>() : nullptr, threads());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vstar_kernels, CPU, m) {
  m.impl("cpu_forward", TORCH_BOX(&cpu_forward));
  m.impl("cpu_backward", TORCH_BOX(&cpu_backward));
}
