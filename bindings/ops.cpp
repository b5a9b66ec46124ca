// Registers the CPU kernels with PyTorch, through its stable C++ ABI. The schemas are Python's
// (vstar_kernels/attention/native.py), or a program's without Python, which calls
// vstar_kernels_define_operators. The arguments' checks that users see are Python's too. Those here
// only keep a direct call of an operator inside its tensors.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "columns_schedule.h"
#include "frames_schedule.h"
#include "schedule.h"
#include "schemas.h"

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

bool is_empty(const Tensor& t) {
  for (int64_t d = 0; d < t.dim(); ++d) {
    if (t.size(d) == 0) return true;
  }
  return false;
}

// Returns the last dimension's stride; 1 where it means nothing.
int64_t dim_stride(const Tensor& t) {
  return t.size(t.dim() - 1) == 1 || is_empty(t) ? 1 : t.stride(t.dim() - 1);
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

// Sets what a problem says of a map that has passed the checks.
void set_map(vstar::Problem& problem, const Tensor& map, const Tensor& query, const Layout& layout,
             int64_t block, bool by_head, const char* name) {
  const int64_t frames = query.size(layout.frame);
  STD_TORCH_CHECK(block >= 1 && (block <= frames || block == 1),
                  "map_block must be 1 to ", frames, ", got ", block);
  const int64_t blocks = (frames + block - 1) / block;
  check_contiguous(map, name);
  const int64_t dims = by_head ? 4 : 3, heads = query.size(layout.head);
  STD_TORCH_CHECK(map.dim() == dims && map.size(0) == query.size(0) &&
                      (!by_head || map.size(1) == heads) && map.size(dims - 2) == blocks &&
                      map.size(dims - 1) == blocks,
                  name, by_head ? " must be (batch, heads, blocks, blocks), blocks"
                                : " must be (batch, blocks, blocks), blocks",
                  " of map_block frames");
  problem.map_block = block;
  problem.map_blocks = blocks;
  problem.map_heads = by_head ? heads : 1;
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
                 int64_t map_block, bool map_by_head) {
  const Arguments arguments = {query, key,      value, delta,          stat_tensor,
                               form,  strength, stat,  clamp_negative, scale};
  const Layout layout = arguments.check();
  check_like(out, query, "out");
  vstar::ForwardArgs args = {};
  if (map) set_map(args, *map, query, layout, map_block, map_by_head, "map");
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
                  bool detach_stat, double scale, int64_t map_block, bool map_by_head) {
  const Arguments arguments = {query, key,      value, delta,          stat_tensor,
                               form,  strength, stat,  clamp_negative, scale};
  const Layout layout = arguments.check();
  check_like(grad_query, query, "grad_query");
  check_like(grad_key, query, "grad_key");
  check_like(grad_value, query, "grad_value");
  check_like_but_strides(grad_out, query, "grad_out");
  vstar::BackwardArgs args = {};
  if (grad_map) set_map(args, *grad_map, query, layout, map_block, map_by_head, "grad_map");
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

// ---- attention over frames ----

vstar::Strides token_strides(const Tensor& t) {
  return {t.stride(0), 0, t.stride(1), t.stride(2)};
}

void check_tokens(const Tensor& t, const Tensor& query, const char* name) {
  STD_TORCH_CHECK(t.dim() == 4 && t.scalar_type() == query.scalar_type() && t.is_cpu() &&
                      t.size(0) == query.size(0) && t.size(3) == query.size(3) &&
                      dim_stride(t) == 1,
                  name, " must be (batch, tokens, heads, head_dim) as query, contiguous in head_dim");
}

void check_int(const Tensor& t, int64_t dims, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Int && t.is_cpu() && t.is_contiguous() &&
                      t.dim() == dims,
                  name, " must be a contiguous int32 tensor of ", dims, " dimensions");
}

vstar::FrameRuns frame_runs(const Tensor& t, int64_t tokens, const char* name) {
  check_int(t, 2, name);
  STD_TORCH_CHECK(t.size(1) == 4, name, " must be (runs, 4)");
  STD_TORCH_CHECK(tokens < (int64_t{1} << 31), "at most 2^31 - 1 tokens");
  vstar::FrameRuns runs = {static_cast<const vstar::FrameRun*>(t.const_data_ptr()), t.size(0), 0};
  for (int64_t r = 0; r < runs.count; ++r) {
    const int64_t frames = int64_t{runs.runs[r].frame} + 1;
    if (frames > runs.frames) runs.frames = frames;
  }
  STD_TORCH_CHECK(runs.frames <= tokens && vstar::are_valid(runs, tokens), name,
                  " must cover all tokens and number their frames");
  return runs;
}

// Returns a table over pairs of frames and sets what a head is apart in it.
const float* frame_table(const Tensor& t, int64_t own_dims, int64_t heads, int64_t query_frames,
                         int64_t key_frames, int64_t* head_stride, const char* name) {
  check_contiguous(t, name);
  const int64_t dims = t.dim();
  STD_TORCH_CHECK((dims == own_dims || (dims == own_dims + 1 && t.size(dims - 3) == heads)) &&
                      t.size(dims - 2) == query_frames && t.size(dims - 1) == key_frames,
                  name, " must be a table of ", query_frames, " by ", key_frames, " frames");
  *head_stride = dims == own_dims ? 0 : query_frames * key_frames;
  return t.const_data_ptr<float>();
}

const int32_t* frame_bounds(const Tensor& t, int64_t query_frames, int64_t key_frames,
                            const char* name) {
  check_int(t, 3, name);
  STD_TORCH_CHECK(t.size(0) == 2 && t.size(1) == query_frames && t.size(2) == key_frames, name,
                  " must be two tables of ", query_frames, " by ", key_frames, " frames");
  return static_cast<const int32_t*>(t.const_data_ptr());
}

// The arguments that both operators over frames take, in their order.
struct FrameArguments {
  const Tensor& query;
  const Tensor& key;
  const Tensor& value;
  const std::optional<Tensor>& key_lengths;
  const std::optional<Tensor>& stat_tensor;
  const Tensor& query_runs;
  const Tensor& key_runs;
  const std::optional<Tensor>& delta;
  const std::optional<Tensor>& offset;
  const std::optional<Tensor>& factor;
  const std::optional<Tensor>& factor_span;
  const std::optional<Tensor>& band;
  int64_t stat;
  bool clamp_negative;
  double scale;
  vstar::FrameRuns queries = {}, keys = {};

  // Checks the arguments and sets the kernels'.
  void set(vstar::FrameArgs& args) {
    check_tokens(query, query, "query");
    check_tokens(key, query, "key");
    check_tokens(value, query, "value");
    STD_TORCH_CHECK(has_shape(value, key, 4), "value must have key's shape");
    args.type = scalar_type(query);
    args.batch = query.size(0);
    args.heads = query.size(2);
    args.key_heads = key.size(2);
    args.head_dim = query.size(3);
    STD_TORCH_CHECK(args.key_heads > 0 && args.heads % args.key_heads == 0,
                    "query's heads must be a multiple of key's");
    args.queries.tokens = query.size(1);
    args.keys.tokens = key.size(1);
    queries = frame_runs(query_runs, query.size(1), "query_runs");
    keys = frame_runs(key_runs, key.size(1), "key_runs");
    args.query = query.const_data_ptr();
    args.key = key.const_data_ptr();
    args.value = value.const_data_ptr();
    args.query_strides = token_strides(query);
    args.key_strides = token_strides(key);
    args.value_strides = token_strides(value);
    args.scale = static_cast<float>(scale);
    if (key_lengths) {
      check_int(*key_lengths, 1, "key_lengths");
      STD_TORCH_CHECK(key_lengths->size(0) == args.batch, "key_lengths must be (batch)");
      args.key_lengths = static_cast<const int32_t*>(key_lengths->const_data_ptr());
    }
    set_rule(args);
  }

  // Returns a map's data after checking that it is one of this call.
  float* map_data(const Tensor& map, bool by_head, const char* name) const {
    check_contiguous(map, name);
    const int64_t dims = map.dim();
    STD_TORCH_CHECK(dims == 3 + by_head && map.size(0) == query.size(0) &&
                        (!by_head || map.size(1) == query.size(2)) &&
                        map.size(dims - 2) == queries.frames && map.size(dims - 1) == keys.frames + 1,
                    name, " must be (batch, [heads,] frames, frames + 1)");
    return map.mutable_data_ptr<float>();
  }

 private:
  void set_rule(vstar::FrameArgs& args) const {
    STD_TORCH_CHECK(stat >= 0 && stat <= 3, "stat must be 0 to 3, got ", stat);
    args.stat = static_cast<vstar::FrameStat>(stat);
    STD_TORCH_CHECK((args.stat == vstar::FrameStat::tensor) == stat_tensor.has_value(),
                    "stat 3 goes with stat_tensor");
    args.clamp_negative = clamp_negative;
    const int64_t heads = args.heads, f = queries.frames, g = keys.frames;
    if (stat_tensor) {
      check_stat(*stat_tensor, query, "stat_tensor");
      args.stat_tensor = stat_tensor->const_data_ptr<float>();
      args.stat_strides = token_strides(*stat_tensor);
    }
    if (delta) args.delta = frame_table(*delta, 2, heads, f, g, &args.delta_head_stride, "delta");
    if (offset) {
      args.offset = frame_table(*offset, 2, heads, f, g, &args.offset_head_stride, "offset");
    }
    if (factor) {
      args.factor = frame_table(*factor, 3, heads, f, g, &args.factor_head_stride, "factor");
      STD_TORCH_CHECK(factor->size(0) == 2, "factor must be two tables");
      args.factor_sign_stride = factor->stride(0);
      if (factor_span) args.factor_span = frame_bounds(*factor_span, f, g, "factor_span");
    }
    if (band) args.band = frame_bounds(*band, f, g, "band");
  }
};

void cpu_frames_forward(Tensor out, std::optional<Tensor> map, Tensor query, Tensor key,
                        Tensor value, std::optional<Tensor> key_lengths,
                        std::optional<Tensor> stat_tensor, Tensor query_runs, Tensor key_runs,
                        std::optional<Tensor> delta, std::optional<Tensor> offset,
                        std::optional<Tensor> factor, std::optional<Tensor> factor_span,
                        std::optional<Tensor> band, int64_t stat, bool clamp_negative,
                        double scale, bool map_by_head) {
  FrameArguments arguments = {query,  key,    value,       key_lengths, stat_tensor,
                              query_runs, key_runs, delta, offset, factor,
                              factor_span, band, stat, clamp_negative, scale};
  vstar::FrameArgs args = {};
  arguments.set(args);
  check_like(out, query, "out");
  vstar::FrameMap frame_map = {nullptr, map_by_head};
  if (map) frame_map.data = arguments.map_data(*map, map_by_head, "map");
  if (is_empty(query)) {
    if (map) torch::stable::fill_(*map, __builtin_nan(""));  // the mean of nothing
    return;
  }
  args.out = out.mutable_data_ptr();
  args.out_strides = token_strides(out);
  vstar::run_frames_forward(args, arguments.queries, arguments.keys, frame_map, threads());
}

void cpu_frames_backward(Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_out,
                         std::optional<Tensor> grad_map, Tensor query, Tensor key, Tensor value,
                         std::optional<Tensor> key_lengths, std::optional<Tensor> stat_tensor,
                         Tensor query_runs, Tensor key_runs, std::optional<Tensor> delta,
                         std::optional<Tensor> offset, std::optional<Tensor> factor,
                         std::optional<Tensor> factor_span, std::optional<Tensor> band,
                         int64_t stat, bool clamp_negative, double scale, bool map_by_head) {
  FrameArguments arguments = {query,  key,    value,       key_lengths, stat_tensor,
                              query_runs, key_runs, delta, offset, factor,
                              factor_span, band, stat, clamp_negative, scale};
  vstar::FrameBackwardArgs args = {};
  arguments.set(args);
  STD_TORCH_CHECK(!factor, "rules with factors have no gradients");
  check_like(grad_query, query, "grad_query");
  check_like(grad_out, query, "grad_out");
  check_like(grad_key, key, "grad_key");
  check_like(grad_value, key, "grad_value");
  args.map_by_head = map_by_head;
  if (grad_map) args.grad_map = arguments.map_data(*grad_map, map_by_head, "grad_map");
  if (is_empty(query) || is_empty(key)) {
    for (Tensor* grad : {&grad_query, &grad_key, &grad_value}) torch::stable::zero_(*grad);
    return;
  }
  args.grad_out = grad_out.const_data_ptr();
  args.grad_out_strides = token_strides(grad_out);
  args.grad_query = grad_query.mutable_data_ptr();
  args.grad_key = grad_key.mutable_data_ptr();
  args.grad_value = grad_value.mutable_data_ptr();
  args.grad_query_strides = token_strides(grad_query);
  args.grad_key_strides = token_strides(grad_key);
  args.grad_value_strides = token_strides(grad_value);
  vstar::run_frames_backward(args, arguments.queries, arguments.keys, threads());
}

// ---- columns of attention's weights ----

// Returns null where there is no tensor.
const void* data_of(const std::optional<Tensor>& t) { return t ? t->const_data_ptr() : nullptr; }
void* mutable_data_of(const std::optional<Tensor>& t) {
  return t ? t->mutable_data_ptr() : nullptr;
}
vstar::Strides token_strides(const std::optional<Tensor>& t) {
  return t ? token_strides(*t) : vstar::Strides{};
}

// The arguments that both operators of columns take, in their order.
struct ColumnArguments {
  const Tensor& query;
  const Tensor& key;
  const std::optional<Tensor>& value;
  const Tensor& columns;
  double scale;

  // Checks the arguments and sets the kernels'.
  void set(vstar::ColumnArgs& args) const {
    check_tokens(query, query, "query");
    check_tokens(key, query, "key");
    STD_TORCH_CHECK(key.size(2) == query.size(2) && key.size(1) > 0,
                    "key must have query's heads, and keys");
    if (value) check_like_key(*value, "value");
    args.type = scalar_type(query);
    args.batch = query.size(0);
    args.queries = query.size(1);
    args.keys = key.size(1);
    args.heads = query.size(2);
    args.head_dim = query.size(3);
    check_contiguous(columns, "columns");
    STD_TORCH_CHECK(columns.dim() == 3 && columns.size(1) == args.keys && columns.size(2) > 0 &&
                        (columns.size(0) == args.batch || columns.size(0) == 1),
                    "columns must be (batch or 1, keys, columns)");
    args.columns = columns.size(2);
    args.column_weights = columns.const_data_ptr<float>();
    args.column_weights_stride = columns.size(0) == 1 ? 0 : args.keys * args.columns;
    args.query = query.const_data_ptr();
    args.key = key.const_data_ptr();
    args.value = data_of(value);
    args.query_strides = token_strides(query);
    args.key_strides = token_strides(key);
    args.value_strides = token_strides(value);
    args.scale = static_cast<float>(scale);
  }

  void check_like_key(const Tensor& t, const char* name) const {
    check_tokens(t, query, name);
    STD_TORCH_CHECK(has_shape(t, key, 4), name, " must have key's shape");
  }

  void check_maps(const Tensor& maps, const char* name) const {
    check_contiguous(maps, name);
    STD_TORCH_CHECK(maps.dim() == 3 && maps.size(0) == query.size(0) &&
                        maps.size(1) == query.size(1) && maps.size(2) == columns.size(2),
                    name, " must be (batch, queries, columns)");
  }
};

void cpu_columns_forward(std::optional<Tensor> out, std::optional<Tensor> maps, Tensor query,
                         Tensor key, std::optional<Tensor> value, Tensor columns, double scale) {
  const ColumnArguments arguments = {query, key, value, columns, scale};
  vstar::ColumnArgs args = {};
  arguments.set(args);
  STD_TORCH_CHECK(out.has_value() == value.has_value(), "out goes with value");
  if (out) check_like(*out, query, "out");
  if (maps) arguments.check_maps(*maps, "maps");
  if (is_empty(query)) return;
  args.out = mutable_data_of(out);
  args.out_strides = token_strides(out);
  if (maps) args.maps = maps->mutable_data_ptr<float>();
  vstar::run_columns_forward(args, threads());
}

void cpu_columns_backward(std::optional<Tensor> grad_query, std::optional<Tensor> grad_key,
                          std::optional<Tensor> grad_value, std::optional<Tensor> grad_out,
                          std::optional<Tensor> grad_maps, Tensor query, Tensor key,
                          std::optional<Tensor> value, Tensor columns, double scale) {
  const ColumnArguments arguments = {query, key, value, columns, scale};
  vstar::ColumnBackwardArgs args = {};
  arguments.set(args);
  STD_TORCH_CHECK(value || !grad_out, "grad_out goes with value");
  STD_TORCH_CHECK(grad_out || !grad_value, "grad_value goes with grad_out");
  if (grad_query) check_like(*grad_query, query, "grad_query");
  if (grad_key) arguments.check_like_key(*grad_key, "grad_key");
  if (grad_value) arguments.check_like_key(*grad_value, "grad_value");
  if (grad_out) check_like(*grad_out, query, "grad_out");
  if (grad_maps) arguments.check_maps(*grad_maps, "grad_maps");
  if (is_empty(query)) {
    for (std::optional<Tensor>* grad : {&grad_query, &grad_key, &grad_value}) {
      if (*grad) torch::stable::zero_(**grad);
    }
    return;
  }
  args.grad_out = data_of(grad_out);
  args.grad_out_strides = token_strides(grad_out);
  if (grad_maps) args.grad_maps = grad_maps->const_data_ptr<float>();
  args.grad_query = mutable_data_of(grad_query);
  args.grad_key = mutable_data_of(grad_key);
  args.grad_value = mutable_data_of(grad_value);
  args.grad_query_strides = token_strides(grad_query);
  args.grad_key_strides = token_strides(grad_key);
  args.grad_value_strides = token_strides(grad_value);
  vstar::run_columns_backward(args, threads());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vstar_kernels, CPU, m) {
  m.impl("cpu_forward", TORCH_BOX(&cpu_forward));
  m.impl("cpu_backward", TORCH_BOX(&cpu_backward));
  m.impl("cpu_frames_forward", TORCH_BOX(&cpu_frames_forward));
  m.impl("cpu_frames_backward", TORCH_BOX(&cpu_frames_backward));
  m.impl("cpu_columns_forward", TORCH_BOX(&cpu_columns_forward));
  m.impl("cpu_columns_backward", TORCH_BOX(&cpu_columns_backward));
}

extern "C" {

// Defines the operators, for packages of AOTInductor in a program without vstar_kernels' Python.
// It is called after the library is loaded and before a package is; again, it does nothing. Returns
// 0, or 1 where torch refuses them, as it does where that Python has defined them.
__attribute__((visibility("default"))) int vstar_kernels_define_operators() {
  // Not by StableLibrary, whose def() passes over errors before torch 2.13.
  static const AOTITorchError refused = [] {
    TorchLibraryHandle library;  // stays, and the operators with it
    AOTITorchError error =
        aoti_torch_library_init_fragment("vstar_kernels", __FILE__, __LINE__, &library);
    for (const char* schema : vstar::schemas) {
      if (error == AOTI_TORCH_SUCCESS) error = aoti_torch_library_def(library, schema);
    }
    return error;
  }();
  return refused == AOTI_TORCH_SUCCESS ? 0 : 1;
}

// Returns the operators' schemas one after another; nullptr past the last.
__attribute__((visibility("default"))) const char* vstar_kernels_schema(int index) {
  constexpr int count = sizeof(vstar::schemas) / sizeof(vstar::schemas[0]);
  return index >= 0 && index < count ? vstar::schemas[index] : nullptr;
}
}
