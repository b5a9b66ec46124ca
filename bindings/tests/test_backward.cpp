// The backward kernel and the mean map of every instruction set against the formula in double
// precision, with NaN in what they write, in the scratch and around the tensors, over sizes on both
// sides of every border.
#include <algorithm>
#include <cmath>

#include "call.h"
#include "check.h"
#include "formula.h"

namespace {

using vstar::Form;
using vstar::Stat;

// Returns the square root of the squared differences' sum; infinite where one is NaN and the other
// is not.
template <typename Real>
double distance(const Real* x, const Numbers<double>& expected) {
  double sum = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    if (std::isnan(expected[i]) && std::isnan(x[i])) continue;
    const double e = x[i] - expected[i];
    sum += std::isnan(e) ? INFINITY : e * e;
  }
  return std::sqrt(sum);
}

// Checks for at most twice the error of the plain formula in float, plus a few roundings of the
// whole.
void expect_close(const char* name, const std::string& call, const void* x,
                  const Numbers<float>& plain, const Numbers<double>& expected) {
  double size = 0;
  for (const double e : expected) size += std::isnan(e) ? 0 : e * e;
  const double allowed = 2 * distance(plain.data(), expected) + 5e-7 * std::sqrt(size) + 1e-12;
  const double error = distance(static_cast<const float*>(x), expected);
  CHECK(error <= allowed, "%s of %s: error %g, allowed %g", name, call.c_str(), error, allowed);
}

void round_down(const void* tensor, size_t count) {
  auto* x = static_cast<float*>(const_cast<void*>(tensor));
  for (size_t i = 0; i < count; ++i) x[i] = x[i] > 0.5f ? 1.0f : 0.0f;
}

// Checks the gradients; with `ties` for queries and keys of few values, so that many logits are
// equal.
void expect_gradients(const Shape& shape, bool ties = false) {
  const auto trim = [&](auto& x) { x.resize(x.size() - static_cast<size_t>(shape.gap)); };
  const auto trim_all = [&](auto results) {  // to the tensors' last rows
    trim(results.grad_query);
    trim(results.grad_key);
    trim(results.grad_value);
    return results;
  };
  Results<float> plain;
  Results<double> exact;  // of the same numbers for every instruction set
  for_each_isa([&](const vstar::Kernels& kernels) {
    Heap heap;
    BackwardCall call(shape, kernels, heap.allocate());
    const vstar::BackwardArgs& args = call.args();
    if (ties) {
      const auto count = static_cast<size_t>(args.batch * args.query_strides.batch - shape.gap);
      round_down(args.query, count);
      round_down(args.key, count);
    }
    call.run_all();
    if (exact.out.empty()) {
      const WholeCall whole(args, call.delta());
      plain = trim_all(whole.formula<float>(&args));
      exact = trim_all(whole.formula<double>(&args));
    }
    const std::string name = std::string(kernels.name) + " " + shape.name() + (ties ? " ties" : "");
    CHECK(call.complete(), "%s", name.c_str());
    expect_close("grad_query", name, args.grad_query, plain.grad_query, exact.grad_query);
    expect_close("grad_key", name, args.grad_key, plain.grad_key, exact.grad_key);
    expect_close("grad_value", name, args.grad_value, plain.grad_value, exact.grad_value);
    if (args.grad_stat) {
      expect_close("grad_stat", name, args.grad_stat, plain.grad_stat, exact.grad_stat);
    }
    if (call.grad_delta()) {
      expect_close("grad_delta", name, call.grad_delta(), plain.grad_delta, exact.grad_delta);
    }
  });
}

void expect_map(const Shape& shape) {
  Numbers<float> plain;
  Numbers<double> exact;  // of the same numbers for every instruction set
  for_each_isa([&](const vstar::Kernels& kernels) {
    Heap heap;
    MapCall call(shape, kernels, heap.allocate());
    call.run_all();
    if (exact.empty()) {
      const WholeCall whole(call.args(), call.delta());
      plain = whole.formula<float>(nullptr).map;
      exact = whole.formula<double>(nullptr).map;
    }
    const std::string name = std::string(kernels.name) + " " + shape.name();
    CHECK(call.complete(), "%s", name.c_str());
    expect_close("map", name, call.map(), plain, exact);
  });
}

void sizes() {
  // Every remainder of frames against panels and tiles, of head_dim against vectors and tiles.
  for (int64_t frames = 1; frames <= 70; ++frames) {
    Shape shape = {.frames = frames, .head_dim = 8 + frames % 5, .gap = 3};
    shape.form = frames % 2 == 0 ? Form::dense : Form::symmetric;
    shape.extra = frames % 4;
    shape.heads_first = frames % 3 == 0;
    expect_gradients(shape);
    expect_map(shape);
  }
  for (int64_t head_dim = 1; head_dim <= 70; ++head_dim) {
    expect_gradients({.batch = 1, .frames = 19, .head_dim = head_dim});
  }
  for (int64_t head_dim : {72, 80, 96, 128, 160, 256}) {
    expect_gradients({.batch = 1, .frames = 35, .heads = 1, .head_dim = head_dim});
  }
  for (int64_t frames : {127, 128, 129, 255, 257, 300}) {  // packed rows, several key blocks
    Shape shape = {.batch = 1, .frames = frames, .heads = 1, .head_dim = 24};
    shape.map_gradient = true;
    expect_gradients(shape);
    expect_map(shape);
  }
  // Blocks of the map: many in a chunk of queries, one, a part of one, and all frames in one.
  for (int64_t frames : {35, 300, 700}) {
    for (int64_t block : {2, 3, 35, 200, 257, 300, 601}) {
      Shape shape = {.batch = 2, .space = 3, .frames = frames, .heads = 1, .head_dim = 9};
      shape.map_block = std::min(block, frames);
      shape.map_gradient = true;
      expect_map(shape);
      if (frames < 700) expect_gradients(shape);
    }
  }
  // A map for each head, of several sequences and of one, whole and in blocks.
  for (int64_t space : {1, 3}) {
    for (int64_t frames : {35, 300}) {
      for (int64_t block : {1, 3, 200}) {
        Shape shape = {.batch = 2, .space = space, .frames = frames, .heads = 3, .head_dim = 9};
        shape.map_block = std::min(block, frames);
        shape.map_gradient = shape.map_by_head = true;
        expect_map(shape);
        if (frames < 300) expect_gradients(shape);
      }
    }
  }
  // Few sequences, which are computed in parts of their queries.
  for (int64_t frames : {513, 770}) {
    for (const auto stat : {Stat::row_max, Stat::tensor, Stat::map_max}) {
      Shape shape = {.batch = 1, .space = 2, .frames = frames, .heads = 1, .head_dim = 21, .gap = 3};
      shape.stat = stat;
      shape.detach_stat = stat == Stat::map_max && frames == 770;
      shape.form = frames == 513 ? Form::dense : Form::signed_table;
      expect_gradients(shape);
      shape.delta_gradient = false;
      expect_gradients(shape);
    }
  }
  // More groups than one for a batch element, more than one run for a group.
  expect_map({.batch = 2, .space = 70, .frames = 5, .heads = 3});
  expect_map({.batch = 70, .frames = 5, .heads = 70});
  Shape by_head = {.batch = 2, .space = 140, .frames = 5, .heads = 3};
  by_head.map_by_head = true;
  expect_map(by_head);
  expect_gradients({.batch = 70, .space = 10, .frames = 5, .heads = 9});
}

void options() {
  for (auto stat : {Stat::none, Stat::row_max, Stat::map_max, Stat::tensor}) {
    for (int bits = 0; bits < 64; ++bits) {
      Shape shape = {.space = 2, .frames = bits % 2 ? 37 : 9, .heads = 3, .head_dim = 12};
      shape.stat = stat;
      shape.clamp_negative = bits & 1;
      shape.form = bits & 2 ? Form::dense : Form::signed_table;
      shape.per_head = bits & 4;
      shape.detach_stat = bits & 8;
      shape.map_gradient = bits & 16;
      shape.delta_gradient = bits & 32;
      expect_gradients(shape);
      if (stat != Stat::tensor) expect_gradients(shape, true);
    }
  }
  for (int64_t dim_stride : {0, 2, 3}) {
    Shape shape = {.frames = 37, .head_dim = 13};
    shape.grad_out_dim_stride = dim_stride;
    expect_gradients(shape);
  }
  Shape plain = {.frames = 37, .map_gradient = true};
  plain.form = Form::none;
  expect_gradients(plain);
}

}  // namespace

int main() {
  sizes();
  options();
  return finish();
}
