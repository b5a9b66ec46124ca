// The backward kernel and the mean map against the formula in double precision, with NaN in what
// they write, in the scratch and around the tensors, over sizes on both sides of every border.
#include <cmath>
#include <deque>
#include <memory>
#include <vector>

#include "check.h"
#include "formula.h"
#include "group_calls.h"

namespace {

using vstar::ScalarType;
using vstar::Stat;

// The results of a whole call, laid out as the kernels lay them out.
template <typename Real>
struct Results {
  Numbers<Real> grad_query, grad_key, grad_value, grad_bias, grad_stat, map;
};

// A call's tensors by their indices. It computes the formula for all sequences.
class Reader {
 public:
  explicit Reader(const vstar::Problem& p, const Shape& s) : p_(p), s_(s) {}

  template <typename Real>
  Results<Real> formula(const vstar::BackwardArgs* backward) const {
    Results<Real> results;
    const auto count = static_cast<size_t>(p_.batch * p_.query_strides.batch);
    for (auto* x : {&results.grad_query, &results.grad_key, &results.grad_value}) {
      x->assign(count, NAN);
    }
    results.grad_bias.assign(bias_size(), 0);
    results.grad_stat.assign(p_.batch * p_.space * p_.frames * p_.heads, 0);
    results.map.assign(p_.batch * p_.frames * p_.frames, 0);
    for (int64_t b = 0; b < p_.batch; ++b)
      for (int64_t s = 0; s < p_.space; ++s)
        for (int64_t h = 0; h < p_.heads; ++h) add<Real>(b, s, h, backward, results);
    return results;
  }

 private:
  template <typename Real>
  void add(int64_t b, int64_t s, int64_t h, const vstar::BackwardArgs* backward,
           Results<Real>& results) const {
    const int64_t N = p_.frames, D = p_.head_dim;
    Formula<Real> f;
    f.N = N;
    f.D = D;
    f.query = read<Real>(p_.query, p_.query_strides, 1, b, s, h);
    f.key = read<Real>(p_.key, p_.key_strides, 1, b, s, h);
    f.value = read<Real>(p_.value, p_.value_strides, 1, b, s, h);
    f.scale = p_.scale;
    f.strength = p_.strength;
    f.stat = p_.stat;
    f.clamp_negative = p_.clamp_negative;
    f.detach_stat = backward && backward->detach_stat;
    for (int64_t cell = 0; p_.bias && cell < N * N; ++cell) {
      f.bias.push_back(p_.bias[h * p_.bias_head_stride + cell % N * p_.bias_key_stride + cell / N]);
    }
    for (int64_t i = 0; p_.stat_values && i < N; ++i) {
      f.stat_values.push_back(p_.stat_values[row(p_.stat_strides, b, s, i, h)]);
    }
    f.forward();
    const Real sequences = static_cast<Real>(p_.space * p_.heads);
    for (int64_t cell = 0; cell < N * N; ++cell) {
      results.map[b * N * N + cell] += f.weights[cell] / sequences;
    }
    if (!backward) return;
    Numbers<Real> through_map(N * N, 0);
    for (int64_t cell = 0; backward->grad_map && cell < N * N; ++cell) {
      through_map[cell] = backward->grad_map[b * N * N + cell] / sequences;
    }
    f.backward(read<Real>(backward->grad_out, backward->grad_out_strides,
                          backward->grad_out_dim_stride, b, s, h),
               through_map);
    for (int64_t i = 0; i < N * D; ++i) {
      const int64_t at = row(p_.query_strides, b, s, i / D, h) + i % D;
      results.grad_query[at] = f.grad_query[i];
      results.grad_key[at] = f.grad_key[i];
      results.grad_value[at] = f.grad_value[i];
    }
    for (int64_t i = 0; p_.stat_values && i < N; ++i) {
      results.grad_stat[row(p_.stat_strides, b, s, i, h)] = f.grad_stat[i];
    }
    for (int64_t cell = 0; p_.bias && cell < N * N; ++cell) {
      const int64_t i = cell / N, j = cell % N;
      const int64_t at = s_.dense ? j * N + i : N - 1 + i - j;
      results.grad_bias[at + h * p_.bias_head_stride] += f.grad_bias[cell];
    }
  }

  static int64_t row(const vstar::Strides& strides, int64_t b, int64_t s, int64_t n, int64_t h) {
    return b * strides.batch + s * strides.space + n * strides.frame + h * strides.head;
  }
  template <typename Real>
  Numbers<Real> read(const void* tensor, const vstar::Strides& strides, int64_t dim_stride,
                     int64_t b, int64_t s, int64_t h) const {
    Numbers<Real> x;
    for (int64_t i = 0; i < p_.frames * p_.head_dim; ++i) {
      const int64_t at = row(strides, b, s, i / p_.head_dim, h) + i % p_.head_dim * dim_stride;
      x.push_back(static_cast<const float*>(tensor)[at]);
    }
    return x;
  }
  size_t bias_size() const {
    const int64_t columns = s_.dense ? p_.frames * p_.frames : 2 * p_.frames - 1;
    return static_cast<size_t>(s_.per_head ? p_.heads * columns : columns);
  }

  const vstar::Problem& p_;
  Shape s_;
};

// The square root of the squared differences' sum; infinite where one is NaN and the other is not.
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

// At most twice the error of the plain formula in float, plus a few roundings of the whole.
void expect_close(const char* name, const std::string& call, const void* x,
                  const Numbers<float>& plain, const Numbers<double>& expected) {
  double size = 0;
  for (const double e : expected) size += std::isnan(e) ? 0 : e * e;
  const double allowed = 2 * distance(plain.data(), expected) + 5e-7 * std::sqrt(size) + 1e-12;
  const double error = distance(static_cast<const float*>(x), expected);
  CHECK(error <= allowed, "%s of %s: error %g, allowed %g", name, call.c_str(), error, allowed);
}

struct Heap {
  std::deque<std::unique_ptr<char[]>> blocks;
  Allocate allocate() {
    return [this](size_t bytes) {
      blocks.emplace_back(new char[bytes]);
      return blocks.back().get();
    };
  }
};

void round_down(const void* tensor, size_t count) {
  auto* x = static_cast<float*>(const_cast<void*>(tensor));
  for (size_t i = 0; i < count; ++i) x[i] = x[i] > 0.5f ? 1.0f : 0.0f;
}

// `ties`: queries and keys of few values, so that many logits are equal.
void expect_gradients(const vstar::Kernels& kernels, const Shape& shape, bool ties = false) {
  Heap heap;
  BackwardCall call(shape, kernels, heap.allocate());
  const vstar::BackwardArgs& args = call.problem();
  if (ties) {
    const auto count = static_cast<size_t>(args.batch * args.query_strides.batch - shape.gap);
    round_down(args.query, count);
    round_down(args.key, count);
  }
  call.run_all();
  const Reader reader(args, shape);
  const auto plain = reader.formula<float>(&args);
  const auto exact = reader.formula<double>(&args);
  const std::string name = std::string(kernels.name) + " " + shape.name() + (ties ? " ties" : "");
  CHECK(call.complete(), "%s", name.c_str());
  const auto trim = [&](auto x) {  // to the tensor's last row
    x.resize(x.size() - static_cast<size_t>(shape.gap));
    return x;
  };
  expect_close("grad_query", name, args.grad_query, trim(plain.grad_query), trim(exact.grad_query));
  expect_close("grad_key", name, args.grad_key, trim(plain.grad_key), trim(exact.grad_key));
  expect_close("grad_value", name, args.grad_value, trim(plain.grad_value), trim(exact.grad_value));
  if (args.grad_stat) {
    expect_close("grad_stat", name, args.grad_stat, plain.grad_stat, exact.grad_stat);
  }
  if (call.grad_bias()) {
    expect_close("grad_bias", name, call.grad_bias(), plain.grad_bias, exact.grad_bias);
  }
}

void expect_map(const vstar::Kernels& kernels, const Shape& shape) {
  Heap heap;
  MapCall call(shape, kernels, heap.allocate());
  call.run_all();
  const Reader reader(call.problem(), shape);
  const std::string name = std::string(kernels.name) + " " + shape.name();
  CHECK(call.complete(), "%s", name.c_str());
  expect_close("map", name, call.map(), reader.formula<float>(nullptr).map,
               reader.formula<double>(nullptr).map);
}

void sizes(const vstar::Kernels& kernels) {
  // Every remainder of frames against panels and tiles, of head_dim against vectors and tiles.
  for (int64_t frames = 1; frames <= 70; ++frames) {
    Shape shape = {.frames = frames, .head_dim = 8 + frames % 5, .gap = 3};
    shape.dense = frames % 2 == 0;
    shape.heads_first = frames % 3 == 0;
    expect_gradients(kernels, shape);
    expect_map(kernels, shape);
  }
  for (int64_t head_dim = 1; head_dim <= 70; ++head_dim) {
    expect_gradients(kernels, {.batch = 1, .frames = 19, .head_dim = head_dim});
  }
  for (int64_t head_dim : {72, 80, 96, 128, 160, 256}) {
    expect_gradients(kernels, {.batch = 1, .frames = 35, .heads = 1, .head_dim = head_dim});
  }
  for (int64_t frames : {127, 128, 129, 255, 257, 300}) {  // packed rows, several key blocks
    Shape shape = {.batch = 1, .frames = frames, .heads = 1, .head_dim = 24};
    shape.map_gradient = true;
    expect_gradients(kernels, shape);
    expect_map(kernels, shape);
  }
  // More groups than one for a batch element, more than one run for a group.
  expect_map(kernels, {.batch = 2, .space = 70, .frames = 5, .heads = 3});
  expect_map(kernels, {.batch = 70, .frames = 5, .heads = 70});
  expect_gradients(kernels, {.batch = 70, .space = 10, .frames = 5, .heads = 9});
}

void options(const vstar::Kernels& kernels) {
  for (auto stat : {Stat::none, Stat::row_max, Stat::map_max, Stat::tensor}) {
    for (int bits = 0; bits < 64; ++bits) {
      Shape shape = {.space = 2, .frames = bits % 2 ? 37 : 9, .heads = 3, .head_dim = 12};
      shape.stat = stat;
      shape.clamp_negative = bits & 1;
      shape.dense = bits & 2;
      shape.per_head = bits & 4;
      shape.detach_stat = bits & 8;
      shape.map_gradient = bits & 16;
      shape.bias_gradient = bits & 32;
      expect_gradients(kernels, shape);
      if (stat != Stat::tensor) expect_gradients(kernels, shape, true);
    }
  }
  for (int64_t dim_stride : {0, 2, 3}) {
    Shape shape = {.frames = 37, .head_dim = 13};
    shape.grad_out_dim_stride = dim_stride;
    expect_gradients(kernels, shape);
  }
  Shape plain = {.frames = 37, .map_gradient = true};
  plain.regularized = false;
  expect_gradients(kernels, plain);
}

}  // namespace

int main() {
  for_each_isa([](const vstar::Kernels& kernels) {
    sizes(kernels);
    options(kernels);
  });
  return finish();
}
