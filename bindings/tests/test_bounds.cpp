// Nothing is read or written outside the tensors, Δ, the statistic and the scratch: each is
// a heap block of its exact size (for AddressSanitizer), then ends at an inaccessible page, then
// begins after one. The three runs agree in every bit, and so do stores through the caches, in the
// first run, and past them, in the others.
#include <csignal>
#include <cstdint>
#include <deque>

#include "call.h"
#include "check.h"
#include "guarded.h"

namespace {

using vstar::Form;
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
    for (int i = 0; i < 16; ++i) blocks_.emplace_back(size_t{1} << 22);
  }

  void expect(const vstar::Kernels& kernels, const Shape& shape) {
    std::snprintf(current, sizeof current, "%s %s", kernels.name, shape.name().c_str());
    expect_same<ForwardCall>(kernels, shape);
    expect_same<MapCall>(kernels, shape);
    expect_same<BackwardCall>(kernels, shape);
  }

 private:
  template <typename Call>
  void expect_same(const vstar::Kernels& kernels, const Shape& shape) {
    Heap heap;
    Call plain(shape, kernels, heap.allocate());
    plain.run_all();
    CHECK(plain.complete(), "%s", current);
    Shape guarded = shape;
    guarded.past_caches = true;
    for (const bool flush_end : {true, false}) {
      size_t used = 0;
      Call call(guarded, kernels, [&](size_t bytes) {
        return blocks_.at(used++).block(bytes, flush_end);
      });
      call.run_all();
      CHECK(call.results() == plain.results(), "%s: other bits between guard pages", current);
      for (size_t i = 0; i < used; ++i) {
        CHECK(blocks_[i].in_place(), "%s: block %zu was written beside", current, i);
      }
    }
  }

  std::deque<Guarded> blocks_;
};

// Checks the forms of Δ, for all heads and for each: each with every third number of frames, so with
// every remainder of vectors and panels; in 16 bits, where Δ is read by the same code, one of them.
void forms(Bounds& bounds, const vstar::Kernels& kernels, Shape shape) {
  constexpr Form kForms[] = {Form::gaussian, Form::symmetric, Form::signed_table, Form::dense,
                             Form::none};
  int64_t i = 0;
  for (const auto form : kForms) {
    for (const bool per_head : {false, true}) {
      if (form == Form::none && per_head) continue;
      shape.form = form;
      shape.per_head = per_head;
      const int64_t period = shape.type == ScalarType::float32 ? 3 : 9;
      if (i++ % period == shape.frames % period) bounds.expect(kernels, shape);
    }
  }
}

void test(const vstar::Kernels& kernels) {
  static Bounds bounds;
  constexpr Stat kStats[] = {Stat::none, Stat::row_max, Stat::map_max, Stat::tensor};
  for (const auto type : {ScalarType::float32, ScalarType::bfloat16, ScalarType::float16}) {
    // Every remainder of frames against panels and keys, with an odd head_dim.
    for (int64_t frames = 1; frames <= 70; ++frames) {
      Shape shape = {.batch = 1, .frames = frames, .head_dim = 1 + 2 * (frames % 23), .type = type};
      shape.stat = kStats[frames % 4];
      shape.heads_first = frames / 3 % 2 == 0;
      shape.gap = frames % 5 == 0 ? 3 : 0;
      shape.map_gradient = frames % 2 == 0;
      shape.map_block = std::min<int64_t>(frames, 1 + frames % 4 * 3);
      shape.extra = frames / 3 % 3 == 0 ? 2 : 0;
      shape.grad_out_dim_stride = frames % 7 == 0 ? 3 : 1;
      forms(bounds, kernels, shape);
    }
    // Every remainder of head_dim against vectors and tiles; few and many (packed) keys.
    for (int64_t head_dim = 1; head_dim <= 70; ++head_dim) {
      for (const int64_t frames : {3, 19, 35}) {
        Shape shape = {.space = 2, .frames = frames, .head_dim = head_dim, .type = type};
        shape.stat = kStats[head_dim % 4];
        shape.heads_first = head_dim % 2 == 0;
        shape.gap = head_dim % 32 == 0 ? 3 : 0;  // no vector is a line
        bounds.expect(kernels, shape);
      }
    }
    // Groups of panels, several key blocks, the usual large heads.
    for (const int64_t frames : {129, 257, 300}) {
      for (const int64_t head_dim : {33, 64, 72, 161}) {
        Shape shape = {.batch = 1, .frames = frames, .head_dim = head_dim, .type = type};
        shape.stat = Stat::tensor;
        bounds.expect(kernels, shape);
        shape.form = Form::dense;
        shape.per_head = shape.heads_first = true;
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
