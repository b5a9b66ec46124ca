// Attention to a few keys and the maps of columns of its weights, both directions, through their
// schedule: against the formula in double precision, with every tensor a block of its exact size,
// then between pages that no one may touch, on one thread and on several. All runs agree in every
// bit.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "check.h"
#include "columns_schedule.h"
#include "guarded.h"

namespace {

using vstar::ScalarType;

// Cuts the items into ranges, each of them a thread's.
void parallel_for(int64_t items, int64_t, const vstar::RangeBody& body) {
  const int64_t ranges = std::min<int64_t>(3, items);
  std::vector<std::thread> threads;
  for (int64_t t = 0; t < ranges; ++t) {
    threads.emplace_back([&, t] { body(items * t / ranges, items * (t + 1) / ranges); });
  }
  for (auto& thread : threads) thread.join();
}
void on_one_thread(int64_t items, int64_t, const vstar::RangeBody& body) { body(0, items); }

size_t at(int64_t i) { return static_cast<size_t>(i); }

// A drawn call.
struct Case {
  int64_t batch, queries, keys, heads, head_dim, columns, column_batches;
  ScalarType type;
  bool has_value, has_maps, one_text, has_grad_out, has_grad_maps, wants_key, wants_value;
  std::vector<float> numbers, weights;

  explicit Case(unsigned seed) : engine_(seed) {
    batch = 1 + draw(3);
    queries = 1 + draw(draw(2) ? 20 : 300);
    keys = 1 + draw(draw(4) ? 80 : 300);
    heads = 1 + draw(4);
    head_dim = 1 + draw(40);
    columns = 1 + draw(draw(3) ? 6 : 40);
    column_batches = draw(2) ? 1 : batch;
    type = static_cast<ScalarType>(seed % 2 ? 0 : draw(3));
    has_value = draw(4) > 0;
    has_maps = !has_value || draw(4) > 0;
    one_text = draw(2);
    has_grad_out = has_value && draw(4) > 0;
    has_grad_maps = !has_grad_out || draw(3) > 0;
    wants_key = draw(2);
    wants_value = has_grad_out && draw(2);
    std::uniform_real_distribution<float> uniform{-1.0f, 1.0f};
    for (int i = 0; i < 4099; ++i) numbers.push_back(2 * uniform(engine_));
    const int sparse = draw(3);  // none, most and all of the columns' weights are zero
    for (int64_t i = 0; i < column_batches * keys * columns; ++i) {
      const bool is_zero = sparse == 2 || (sparse == 1 && draw(30) > 0);
      weights.push_back(is_zero ? 0.0f : uniform(engine_));
    }
  }

 private:
  int draw(int count) { return static_cast<int>(engine_() % static_cast<unsigned>(count)); }

  std::minstd_rand engine_;
};

using Allocate = std::function<void*(size_t bytes)>;

// A drawn call in memory that the test lays out.
class Call {
 public:
  Call(const Case& c, const Allocate& allocate) : c_(c), allocate_(allocate) {
    vstar::ColumnBackwardArgs& a = args_;
    a.type = c.type;
    a.batch = c.batch;
    a.queries = c.queries;
    a.keys = c.keys;
    a.heads = c.heads;
    a.head_dim = c.head_dim;
    a.columns = c.columns;
    a.scale = 0.4f;
    const vstar::Strides rows = strides(c.queries), text = strides(c.keys);
    const int64_t texts = c.one_text ? 1 : c.batch;
    vstar::Strides shared = text;
    if (c.one_text) shared.batch = 0;
    a.query = random(rows, c.batch, 0);
    a.key = random(text, texts, 1000);
    if (c.has_value) a.value = random(text, texts, 2000);
    a.query_strides = rows;
    a.key_strides = a.value_strides = shared;
    a.column_weights = copy(c.weights);
    a.column_weights_stride = c.column_batches == 1 ? 0 : c.keys * c.columns;
    if (c.has_value) a.out = result(rows, c.batch);
    a.out_strides = a.grad_out_strides = a.grad_query_strides = rows;
    a.grad_key_strides = a.grad_value_strides = text;
    const int64_t cells = c.batch * c.queries * c.columns;
    if (c.has_maps) a.maps = static_cast<float*>(result_bytes(at(cells) * 4));
    if (c.has_grad_out) a.grad_out = random(rows, c.batch, 3000);
    std::vector<float> grads(at(cells));
    for (size_t i = 0; i < grads.size(); ++i) grads[i] = c.numbers[(i + 5) % c.numbers.size()];
    if (c.has_grad_maps) a.grad_maps = copy(grads);
    a.grad_query = result(rows, c.batch);
    if (c.wants_key) a.grad_key = result(text, c.batch);
    if (c.wants_value) a.grad_value = result(text, c.batch);
  }

  // Computes the output, the maps and the gradients, and returns all of their bytes.
  std::string run(const vstar::Threads& threads) {
    for (const auto& [data, bytes] : results_) std::memset(data, 0xff, bytes);
    vstar::ColumnArgs forward = args_;
    vstar::run_columns_forward(forward, threads);
    vstar::ColumnBackwardArgs backward = args_;
    vstar::run_columns_backward(backward, threads);
    std::string all;
    for (const auto& [data, bytes] : results_) all.append(static_cast<char*>(data), bytes);
    return all;
  }

  // Compares the output and the maps, of a call in float32, with the formula.
  void check(const char* name) const {
    double worst = 0;
    std::vector<double> weights(at(c_.keys)), maps(at(c_.columns));
    for (int64_t b = 0; b < c_.batch; ++b) {
      const float* columns = args_.column_weights + b * args_.column_weights_stride;
      for (int64_t i = 0; i < c_.queries; ++i) {
        std::fill(maps.begin(), maps.end(), 0.0);
        for (int64_t h = 0; h < c_.heads; ++h) {
          double total = 0;
          for (int64_t j = 0; j < c_.keys; ++j) {
            double phi = 0;
            for (int64_t d = 0; d < c_.head_dim; ++d) {
              phi += number(args_.query, args_.query_strides, b, i, h, d) *
                     number(args_.key, args_.key_strides, b, j, h, d);
            }
            total += weights[at(j)] = std::exp(static_cast<double>(args_.scale) * phi);
          }
          for (double& weight : weights) weight /= total;
          for (int64_t d = 0; c_.has_value && d < c_.head_dim; ++d) {
            double sum = 0;
            for (int64_t j = 0; j < c_.keys; ++j) {
              sum += weights[at(j)] * number(args_.value, args_.value_strides, b, j, h, d);
            }
            grow(worst, number(args_.out, args_.out_strides, b, i, h, d) - sum);
          }
          for (int64_t j = 0; j < c_.keys; ++j) {
            for (int64_t k = 0; k < c_.columns; ++k) {
              maps[at(k)] += weights[at(j)] * static_cast<double>(columns[j * c_.columns + k]) /
                             static_cast<double>(c_.heads);
            }
          }
        }
        for (int64_t k = 0; c_.has_maps && k < c_.columns; ++k) {
          grow(worst, args_.maps[(b * c_.queries + i) * c_.columns + k] - maps[at(k)]);
        }
      }
    }
    CHECK(worst < 2e-5, "%s: error %g", name, worst);
  }

 private:
  static void grow(double& worst, double error) {
    if (!(std::fabs(error) <= worst)) worst = std::isnan(error) ? INFINITY : std::fabs(error);
  }
  static double number(const void* tensor, const vstar::Strides& s, int64_t b, int64_t token,
                       int64_t h, int64_t d) {
    return static_cast<const float*>(tensor)[b * s.batch + token * s.frame + h * s.head + d];
  }
  vstar::Strides strides(int64_t tokens) const {
    const int64_t row = c_.head_dim + 3;  // a gap
    return {tokens * c_.heads * row, 0, c_.heads * row, row};
  }
  size_t element() const { return c_.type == ScalarType::float32 ? 4 : 2; }
  void* random(const vstar::Strides& s, int64_t batch, size_t first) {
    const size_t bytes = at(batch * s.batch - 3) * element();
    auto* data = static_cast<char*>(allocate_(bytes));
    for (size_t i = 0; i < bytes / element(); ++i) {
      uint32_t bits;
      const float x = c_.numbers[(first + i * 7) % c_.numbers.size()];
      std::memcpy(&bits, &x, 4);
      if (c_.type == ScalarType::bfloat16) bits >>= 16;
      if (c_.type == ScalarType::float16) bits = 0x3000 | (bits >> 13 & 0x83ff);
      std::memcpy(data + i * element(), &bits, element());
    }
    return data;
  }
  const float* copy(const std::vector<float>& x) {
    void* data = allocate_(x.size() * sizeof(float));
    std::memcpy(data, x.data(), x.size() * sizeof(float));
    return static_cast<float*>(data);
  }
  void* result_bytes(size_t bytes) {
    results_.push_back({allocate_(bytes), bytes});
    return results_.back().first;
  }
  void* result(const vstar::Strides& s, int64_t batch) {
    return result_bytes(at(batch * s.batch - 3) * element());
  }

  const Case& c_;
  const Allocate& allocate_;
  vstar::ColumnBackwardArgs args_ = {};
  std::vector<std::pair<void*, size_t>> results_;
};

void test(const vstar::Kernels& kernels) {
  static std::deque<Guarded> blocks;
  while (blocks.size() < 12) blocks.emplace_back(size_t{4} << 20);
  vstar::select_kernels(kernels);
  for (unsigned seed = 1; seed <= 60; ++seed) {
    const Case c(seed);
    const std::string name = std::string(kernels.name) + " case " + std::to_string(seed);
    std::deque<std::unique_ptr<char[]>> heap;
    const Allocate exact = [&](size_t bytes) {
      heap.emplace_back(new char[bytes]);
      return heap.back().get();
    };
    Call plain(c, exact);
    const std::string expected = plain.run({1, on_one_thread});
    if (c.type == ScalarType::float32) plain.check(name.c_str());
    CHECK(plain.run({3, parallel_for}) == expected, "%s: other bits on threads", name.c_str());
    for (const bool flush_end : {true, false}) {
      size_t used = 0;
      const Allocate guarded = [&](size_t bytes) {
        return blocks.at(used++).block(bytes, flush_end);
      };
      Call call(c, guarded);
      CHECK(call.run({1, on_one_thread}) == expected, "%s: other bits between guard pages",
            name.c_str());
      for (size_t i = 0; i < used; ++i) {
        CHECK(blocks[i].in_place(), "%s: block %zu was written beside", name.c_str(), i);
      }
    }
  }
}

}  // namespace

int main() {
  for_each_isa(test);
  return finish();
}
