// The forward kernel of every instruction set against the formula in double precision, with NaN in
// the output, in the scratch and around the tensors, over sizes on both sides of every border.
#include <cmath>
#include <vector>

#include "call.h"
#include "check.h"
#include "formula.h"

namespace {

using vstar::Form;
using vstar::Stat;

// Returns the largest difference; infinite where one is NaN and the other is not.
template <typename Real>
double largest_error(const Real* out, const Numbers<double>& expected, int64_t count) {
  double worst = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (std::isnan(expected[i]) && std::isnan(out[i])) continue;
    const double e = std::fabs(out[i] - expected[i]);
    if (!(e <= worst)) worst = std::isnan(e) ? INFINITY : e;
  }
  return worst;
}

// Sets the first element of each query to `shift` and of each key to -1: all logits are negative.
void make_negative(const vstar::ForwardArgs& args, float shift) {
  for (int64_t row = 0; row < args.batch * args.query_strides.batch;
       row += args.query_strides.head) {
    static_cast<float*>(const_cast<void*>(args.query))[row] = shift;
    static_cast<float*>(const_cast<void*>(args.key))[row] = -1.0f;
  }
}

// Checks for at most twice the error of the plain formula in float, plus a few roundings.
void expect_exact(Shape shape, float shift = 0.0f) {
  shape.gap = 3;
  Numbers<double> expected;  // of the same numbers for every instruction set
  double allowed = 0;
  for_each_isa([&](const vstar::Kernels& kernels) {
    Heap heap;
    ForwardCall call(shape, kernels, heap.allocate());
    const vstar::ForwardArgs& args = call.args();
    if (shift != 0.0f) make_negative(args, shift);
    call.run_all();
    const int64_t count = shape.batch * args.query_strides.batch - shape.gap;
    if (expected.empty()) {
      const WholeCall whole(args, call.delta());
      expected = whole.formula<double>(nullptr).out;
      const auto plain = whole.formula<float>(nullptr).out;
      allowed = 2 * largest_error(plain.data(), expected, count) + 1e-6;
    }
    const double error = largest_error(static_cast<const float*>(args.out), expected, count);
    CHECK(error <= allowed, "%s %s: error %g, allowed %g", kernels.name, shape.name().c_str(),
          error, allowed);
  });
}

void sizes() {
  // Every remainder of frames against panels and keys, of head_dim against vectors and tiles.
  for (int64_t frames = 1; frames <= 70; ++frames) {
    expect_exact({.frames = frames, .head_dim = 8 + frames % 5});
  }
  for (int64_t head_dim = 1; head_dim <= 70; ++head_dim) {
    expect_exact({.frames = 19, .head_dim = head_dim});
  }
  for (int64_t head_dim : {72, 80, 96, 128, 160, 256}) {
    expect_exact({.frames = 33, .head_dim = head_dim});
  }
  // Packed rows, several panels at once, several key blocks.
  for (int64_t frames : {127, 128, 255, 257, 511, 513, 1030}) {
    expect_exact({.batch = 1, .frames = frames, .heads = 1, .head_dim = 72});
  }
}

void options() {
  // The tables differ in their layout only, which the number of frames makes no difference to.
  const auto sizes_of = [](Form form) {
    return form == Form::signed_table || form == Form::dense ? std::vector<int64_t>{5, 37, 300}
                                                             : std::vector<int64_t>{5, 37};
  };
  for (auto stat : {Stat::none, Stat::row_max, Stat::map_max, Stat::tensor}) {
    for (auto form : {Form::gaussian, Form::symmetric, Form::signed_table, Form::dense}) {
      for (int bits = 0; bits < 4; ++bits) {
        for (int64_t frames : sizes_of(form)) {
          Shape shape = {.space = 3, .frames = frames, .head_dim = 12, .form = form};
          shape.stat = stat;
          shape.clamp_negative = bits & 1;
          shape.per_head = bits & 2;
          shape.extra = frames % 3;
          expect_exact(shape);
        }
      }
    }
  }
  expect_exact({.frames = 37, .form = Form::none});
  // Negative row maxima turn the regularization round, or with clamp_negative switch it off.
  expect_exact({.frames = 21}, 40.0f);
  expect_exact({.frames = 21, .clamp_negative = true}, 40.0f);
}

// Checks that the cut into items does not show in a single bit.
void cuts(const vstar::Kernels& kernels) {
  for (int64_t frames : {65, 130, 600}) {
    const Shape shape = {.frames = frames, .head_dim = 40};
    Heap heap;
    ForwardCall whole(shape, kernels, heap.allocate()), cut(shape, kernels, heap.allocate());
    whole.run_all();
    cut.args().queries_per_item = 64;
    cut.run_all();
    CHECK(whole.complete() && cut.results() == whole.results(), "%s %s differs when cut",
          kernels.name, shape.name().c_str());
  }
}

}  // namespace

int main() {
  sizes();
  options();
  for_each_isa(cuts);
  return finish();
}
