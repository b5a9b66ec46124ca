// Nothing is read or written outside the tensors, the bias, the statistic and the scratch: each is
// a heap block of its exact size (for AddressSanitizer), then ends at an inaccessible page, then
// begins after one. The three runs agree in every bit.
#include <csignal>
#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "check.h"
#include "group_calls.h"
#include "guarded.h"

namespace {

using vstar::ScalarType;
using vstar::Stat;

char current[256];  // what a crash was in

// AddressSanitizer brings a handler of its own, which says more.
#if !defined(__SANITIZE_ADDRESS__)
void on_crash(int) {
  const char message[] = "read or written out of bounds: ";
  (void)!write(STDOUT_FILENO, message, sizeof message - 1);
  (void)!write(STDOUT_FILENO, current, std::strlen(current));
  (void)!write(STDOUT_FILENO, "\n", 1);
  _exit(EXIT_FAILURE);
}
#endif

class Bounds {
 public:
  Bounds() {
    for (int i = 0; i < 14; ++i) blocks_.emplace_back(size_t{1} << 22);
  }

  void expect(const vstar::Kernels& kernels, const Shape& shape) {
    std::snprintf(current, sizeof current, "%s %s", kernels.name, shape.name().c_str());
    expect_same<Call>(kernels, shape, [&](Call& call) {
      kernels.forward(call.args(), 0, call.items(), call.scratch());
    });
    expect_same<MapCall>(kernels, shape, [](MapCall& call) { call.run_all(); });
    expect_same<BackwardCall>(kernels, shape, [](BackwardCall& call) { call.run_all(); });
  }

 private:
  template <typename AnyCall, typename Run>
  void expect_same(const vstar::Kernels& kernels, const Shape& shape, const Run& run) {
    std::vector<std::unique_ptr<char[]>> heap;
    AnyCall plain(shape, kernels, [&](size_t bytes) {
      heap.emplace_back(new char[bytes]);
      return heap.back().get();
    });
    run(plain);
    CHECK(plain.complete(), "%s", current);
    for (const bool flush_end : {true, false}) {
      size_t used = 0;
      AnyCall call(shape, kernels, [&](size_t bytes) {
        return blocks_.at(used++).block(bytes, flush_end);
      });
      run(call);
      CHECK(call.out() == plain.out(), "%s: other bits between guard pages", current);
      for (size_t i = 0; i < used; ++i) {
        CHECK(blocks_[i].in_place(), "%s: block %zu was written beside", current, i);
      }
    }
  }

  std::deque<Guarded> blocks_;
};

// The forms of the bias: Toeplitz or dense, for all heads or each; and none.
void biases(Bounds& bounds, const vstar::Kernels& kernels, Shape shape) {
  for (int form = 0; form < 4; ++form) {
    shape.dense = form & 1;
    shape.per_head = form & 2;
    bounds.expect(kernels, shape);
  }
  shape.regularized = false;
  bounds.expect(kernels, shape);
}

void test(const vstar::Kernels& kernels) {
  static Bounds bounds;
  constexpr Stat kStats[] = {Stat::none, Stat::row_max, Stat::map_max, Stat::tensor};
  for (const auto type : {ScalarType::float32, ScalarType::bfloat16, ScalarType::float16}) {
    // Every remainder of frames against panels and key rows, with an odd head_dim.
    for (int64_t frames = 1; frames <= 70; ++frames) {
      Shape shape = {.batch = 1, .frames = frames, .head_dim = 1 + 2 * (frames % 23), .type = type};
      shape.stat = kStats[frames % 4];
      shape.heads_first = frames % 3 == 0;
      shape.gap = frames % 5 == 0 ? 3 : 0;
      shape.map_gradient = frames % 2 == 0;
      shape.grad_out_dim_stride = frames % 7 == 0 ? 3 : 1;
      biases(bounds, kernels, shape);
    }
    // Every remainder of head_dim against vectors and tiles; few and many (packed) keys.
    for (int64_t head_dim = 1; head_dim <= 70; ++head_dim) {
      for (const int64_t frames : {3, 19, 35}) {
        Shape shape = {.space = 2, .frames = frames, .head_dim = head_dim, .type = type};
        shape.stat = kStats[head_dim % 4];
        shape.heads_first = head_dim % 2 == 0;
        bounds.expect(kernels, shape);
      }
    }
    // Groups of panels, several key blocks, the usual large heads.
    for (const int64_t frames : {129, 257, 300}) {
      for (const int64_t head_dim : {33, 72, 161}) {
        Shape shape = {.batch = 1, .frames = frames, .head_dim = head_dim, .type = type};
        shape.stat = Stat::tensor;
        bounds.expect(kernels, shape);
        shape.dense = shape.per_head = shape.heads_first = true;
        bounds.expect(kernels, shape);
      }
    }
  }
  // The softmax's exponential alone.
  std::deque<Guarded> ends;
  for (int i = 0; i < 2; ++i) ends.emplace_back(1024);
  for (const bool flush_end : {true, false}) {
    for (size_t count = 1; count <= 40; ++count) {
      std::snprintf(current, sizeof current, "%s exp2 of %zu", kernels.name, count);
      auto* in = static_cast<float*>(ends[0].block(count * 4, flush_end));
      auto* out = static_cast<float*>(ends[1].block(count * 4, flush_end));
      for (size_t i = 0; i < count; ++i) in[i] = -static_cast<float>(i);
      kernels.exp2(in, out, static_cast<int64_t>(count));
      CHECK(ends[1].in_place(), "%s: written beside", current);
    }
  }
}

}  // namespace

int main() {
#if !defined(__SANITIZE_ADDRESS__)
  std::signal(SIGSEGV, on_crash);
  std::signal(SIGBUS, on_crash);
#endif
  for_each_isa(test);
  return finish();
}
