// The forward kernel against the formula in double precision, with NaN in the output, in the scratch
// and around the tensors, over sizes on both sides of every border.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "formula.h"

namespace {

struct Case {
  int64_t batch = 2, space = 1, frames = 16, heads = 2, head_dim = 8;
  int64_t gap = 3;  // elements between rows, which no one may touch
  vstar::Stat stat = vstar::Stat::row_max;
  bool clamp_negative = false, dense = false, per_head = false, regularized = true;
  int64_t rows_per_item = 0;  // 0: all
  float shift = 0;            // added to the queries' first element, to make all logits negative

  std::string name() const {
    return "N=" + std::to_string(frames) + " D=" + std::to_string(head_dim) +
           " stat=" + std::to_string(static_cast<int>(stat)) + (dense ? " dense" : "") +
           (regularized ? "" : " plain");
  }
};

class Problem {
 public:
  explicit Problem(const Case& c) : c_(c) {
    const int64_t row = c.head_dim + c.gap;
    strides_ = {c.space * c.frames * c.heads * row, c.frames * c.heads * row, c.heads * row, row};
    const auto size = static_cast<size_t>(c.batch * strides_.batch);
    for (auto* tensor : {&q_, &k_, &v_, &out_}) tensor->assign(size, NAN);
    std::normal_distribution<float> normal;
    each_row([&](int64_t row_start) {
      for (int64_t d = 0; d < c.head_dim; ++d) {
        q_[row_start + d] = normal(random_);
        k_[row_start + d] = normal(random_);
        v_[row_start + d] = normal(random_);
      }
      if (c.shift != 0) {
        q_[row_start] = c.shift;
        k_[row_start] = -1.0f;
      }
    });
    bias_heads_ = c.per_head ? c.heads : 1;
    bias_.resize(static_cast<size_t>(
        bias_heads_ * (c.dense ? c.frames * c.frames : 2 * c.frames - 1)));
    for (auto& x : bias_) x = std::fabs(normal(random_));
    stat_.resize(static_cast<size_t>(c.batch * c.space * c.frames * c.heads));
    for (auto& x : stat_) x = normal(random_);
  }

  void run(const vstar::Kernels& kernels) {
    std::fill(out_.begin(), out_.end(), NAN);
    vstar::ForwardArgs a = {};
    a.batch = c_.batch;
    a.space = c_.space;
    a.frames = c_.frames;
    a.heads = c_.heads;
    a.head_dim = c_.head_dim;
    a.query = q_.data();
    a.key = k_.data();
    a.value = v_.data();
    a.out = out_.data();
    a.query_strides = a.key_strides = a.value_strides = a.out_strides = strides_;
    a.scale = scale();
    if (c_.regularized) {
      a.bias = bias_.data() + (c_.dense ? 0 : c_.frames - 1);
      a.bias_key_stride = c_.dense ? c_.frames : -1;
      a.bias_head_stride = c_.per_head ? static_cast<int64_t>(bias_.size()) / c_.heads : 0;
    }
    a.strength = kStrength;
    a.stat = c_.stat;
    a.clamp_negative = c_.clamp_negative;
    a.stat_values = stat_.data();
    a.stat_strides = {c_.space * c_.frames * c_.heads, c_.frames * c_.heads, c_.heads, 1};
    a.rows_per_item = c_.rows_per_item ? c_.rows_per_item : c_.frames;
    const int64_t items = (c_.frames + a.rows_per_item - 1) / a.rows_per_item;
    const int64_t all = c_.batch * c_.space * c_.heads * items;
    std::vector<float> scratch(static_cast<size_t>(kernels.forward_scratch(a)), NAN);
    // In two parts, as two threads would take them.
    kernels.forward(a, 0, all / 2, scratch.data());
    kernels.forward(a, all / 2, all, scratch.data());
  }

  // The formula as it stands, in any precision; NaN outside the tensor.
  template <typename Real>
  std::vector<Real> formula() const {
    std::vector<Real> out(out_.size(), NAN);
    for (int64_t b = 0; b < c_.batch; ++b) {
      for (int64_t s = 0; s < c_.space; ++s) {
        for (int64_t h = 0; h < c_.heads; ++h) formula(b, s, h, out);
      }
    }
    return out;
  }

  const std::vector<float>& out() const { return out_; }

 private:
  static constexpr float kStrength = 0.7f;

  float scale() const { return 1.0f / std::sqrt(static_cast<float>(c_.head_dim)); }
  int64_t start(int64_t b, int64_t s, int64_t n, int64_t h) const {
    return b * strides_.batch + s * strides_.space + n * strides_.frame + h * strides_.head;
  }
  template <typename Body>
  void each_row(const Body& body) {
    for (int64_t b = 0; b < c_.batch; ++b)
      for (int64_t s = 0; s < c_.space; ++s)
        for (int64_t n = 0; n < c_.frames; ++n)
          for (int64_t h = 0; h < c_.heads; ++h) body(start(b, s, n, h));
  }

  float bias(int64_t h, int64_t i, int64_t j) const {
    const int64_t N = c_.frames, head = c_.per_head ? h : 0;
    return c_.dense ? bias_[(head * N + j) * N + i] : bias_[head * (2 * N - 1) + N - 1 + i - j];
  }

  template <typename Real>
  void formula(int64_t b, int64_t s, int64_t h, std::vector<Real>& out) const {
    const int64_t N = c_.frames, D = c_.head_dim;
    Formula<Real> f;
    f.N = N;
    f.D = D;
    f.scale = scale();
    f.strength = kStrength;
    f.stat = c_.stat;
    f.clamp_negative = c_.clamp_negative;
    for (int64_t i = 0; i < N; ++i) {
      const auto row = static_cast<size_t>(start(b, s, i, h));
      f.query.insert(f.query.end(), &q_[row], &q_[row] + D);
      f.key.insert(f.key.end(), &k_[row], &k_[row] + D);
      f.value.insert(f.value.end(), &v_[row], &v_[row] + D);
      f.stat_values.push_back(stat_[((b * c_.space + s) * N + i) * c_.heads + h]);
      for (int64_t j = 0; j < N && c_.regularized; ++j) f.bias.push_back(bias(h, i, j));
    }
    f.forward();
    for (int64_t i = 0; i < N; ++i) {
      std::copy_n(f.out.begin() + i * D, D, out.begin() + start(b, s, i, h));
    }
  }

  Case c_;
  vstar::Strides strides_;
  int64_t bias_heads_;
  std::vector<float> q_, k_, v_, out_, bias_, stat_;
  std::mt19937 random_{20240320};
};

// The largest difference; infinite where one is NaN and the other is not.
template <typename Real>
double largest_error(const std::vector<Real>& out, const std::vector<double>& expected) {
  double worst = 0;
  for (size_t i = 0; i < out.size(); ++i) {
    if (std::isnan(expected[i]) && std::isnan(out[i])) continue;
    const double e = std::fabs(out[i] - expected[i]);
    if (!(e <= worst)) worst = std::isnan(e) ? INFINITY : e;
  }
  return worst;
}

// At most twice the error of the plain formula in float, plus a few roundings.
void expect_exact(const vstar::Kernels& kernels, const Case& c) {
  Problem problem(c);
  problem.run(kernels);
  const auto expected = problem.formula<double>();
  const double allowed = 2 * largest_error(problem.formula<float>(), expected) + 1e-6;
  const double error = largest_error(problem.out(), expected);
  CHECK(error <= allowed, "%s %s: error %g, allowed %g", kernels.name, c.name().c_str(), error,
        allowed);
}

void sizes(const vstar::Kernels& kernels) {
  // Every remainder of frames against panels and key rows, of head_dim against vectors and tiles.
  for (int64_t frames = 1; frames <= 70; ++frames) {
    expect_exact(kernels, {.frames = frames, .head_dim = 8 + frames % 5});
  }
  for (int64_t head_dim = 1; head_dim <= 70; ++head_dim) {
    expect_exact(kernels, {.frames = 19, .head_dim = head_dim});
  }
  for (int64_t head_dim : {72, 80, 96, 128, 160, 256}) {
    expect_exact(kernels, {.frames = 33, .head_dim = head_dim});
  }
  // Packed rows, groups of panels, several key blocks.
  for (int64_t frames : {127, 128, 255, 257, 511, 513, 1030}) {
    expect_exact(kernels, {.batch = 1, .frames = frames, .heads = 1, .head_dim = 72});
  }
}

void options(const vstar::Kernels& kernels) {
  for (auto stat : {vstar::Stat::none, vstar::Stat::row_max, vstar::Stat::map_max,
                    vstar::Stat::tensor}) {
    for (int bits = 0; bits < 8; ++bits) {
      for (int64_t frames : {5, 37, 300}) {
        Case c = {.space = 3, .frames = frames, .head_dim = 12, .stat = stat};
        c.clamp_negative = bits & 1;
        c.dense = bits & 2;
        c.per_head = bits & 4;
        expect_exact(kernels, c);
      }
    }
  }
  expect_exact(kernels, {.frames = 37, .regularized = false});
  // Negative row maxima turn the bias round, or with clamp_negative switch it off.
  expect_exact(kernels, {.frames = 21, .shift = 40.0f});
  expect_exact(kernels, {.frames = 21, .clamp_negative = true, .shift = 40.0f});
}

// The cut into items must not show in a single bit.
void cuts(const vstar::Kernels& kernels) {
  for (int64_t frames : {65, 130, 600}) {
    Case c = {.frames = frames, .head_dim = 40};
    Problem whole(c);
    whole.run(kernels);
    c.rows_per_item = 64;
    Problem cut(c);
    cut.run(kernels);
    CHECK(std::memcmp(whole.out().data(), cut.out().data(), whole.out().size() * 4) == 0,
          "%s %s differs when cut", kernels.name, c.name().c_str());
  }
}

}  // namespace

int main() {
  for_each_isa([](const vstar::Kernels& kernels) {
    sizes(kernels);
    options(kernels);
    cuts(kernels);
  });
  return finish();
}
