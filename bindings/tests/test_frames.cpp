// Attention over frames, both directions, through their schedule: against the formula in double
// precision, with every tensor a block of its exact size, then between pages that no one may touch,
// on one thread and on several. All runs agree in every bit.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "frames_schedule.h"
#include "guarded.h"

namespace {

using vstar::FrameRun;
using vstar::FrameStat;
using vstar::ScalarType;

constexpr float kInfinity = INFINITY;

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

// A drawn call: its layouts, its rule and its tensors' contents.
struct Case {
  int64_t batch, heads, key_heads, head_dim;
  std::vector<FrameRun> query_runs, key_runs;
  int64_t query_frames = 0, key_frames = 0, queries = 0, keys = 0;
  ScalarType type;
  FrameStat stat;
  bool clamp, by_head, has_map;
  std::vector<float> delta, offset, factor, numbers;
  std::vector<int32_t> span, band, lengths;

  explicit Case(unsigned seed) : engine_(seed) {
    key_heads = 1 + draw(2);
    heads = key_heads * (1 + draw(2));
    batch = 1 + draw(2);
    head_dim = 1 + draw(40);
    queries = lay_out(query_runs, query_frames);
    keys = lay_out(key_runs, key_frames);
    type = static_cast<ScalarType>(seed % 2 ? 0 : draw(3));
    stat = static_cast<FrameStat>(draw(4));
    clamp = draw(2);
    by_head = draw(2);
    has_map = draw(2);
    const int64_t pairs = query_frames * key_frames * (by_head ? heads : 1);
    if (draw(3) > 0) delta = table(pairs, 0.0f, 1.0f);
    if (draw(2) > 0) {
      offset = table(pairs, -1.0f, 1.0f);
      for (float& x : offset) x = x < -0.3f ? -kInfinity : x;
    }
    if (draw(3) == 0) {
      factor = table(2 * pairs, 0.3f, 1.2f);
      if (draw(2) > 0) span = bounds();
    }
    if (draw(3) == 0) band = bounds();
    if (draw(3) == 0) {
      for (int64_t b = 0; b < batch; ++b) lengths.push_back(draw(static_cast<int>(keys + 3)) - 1);
    }
    numbers = table(4099, -2.0f, 2.0f);
  }

  const float* or_null(const std::vector<float>& x) const { return x.empty() ? nullptr : x.data(); }
  bool has_gradients() const { return factor.empty(); }

 private:
  int draw(int count) { return static_cast<int>(engine_() % static_cast<unsigned>(count)); }

  int64_t lay_out(std::vector<FrameRun>& runs, int64_t& frames) {
    frames = 1 + draw(4);
    const int most = draw(3) == 0 ? 150 : 20;
    std::vector<int32_t> sizes(static_cast<size_t>(frames));
    int32_t token = 0;
    const auto add = [&](int32_t frame, int32_t count) {
      const int32_t index = frame < 0 ? 0 : sizes[static_cast<size_t>(frame)];
      runs.push_back({token, token + count, frame, index});
      if (frame >= 0) sizes[static_cast<size_t>(frame)] += count;
      token += count;
    };
    if (draw(2)) add(-1, 1 + draw(9));
    for (int32_t f = 0; f < frames; ++f) add(f, 1 + draw(most));
    if (draw(2)) add(-1, 1 + draw(9));
    for (int i = draw(3); i > 0; --i) add(draw(static_cast<int>(frames)), 1 + draw(9));
    return token;
  }
  std::vector<float> table(int64_t count, float low, float high) {
    std::uniform_real_distribution<float> uniform{low, high};
    std::vector<float> result(static_cast<size_t>(count));
    for (float& x : result) x = uniform(engine_);
    return result;
  }
  std::vector<int32_t> bounds() {
    const int64_t pairs = query_frames * key_frames;
    std::vector<int32_t> result(static_cast<size_t>(2 * pairs));
    for (int64_t i = 0; i < pairs; ++i) {
      result[static_cast<size_t>(i)] = draw(5) == 0 ? -(1 << 30) : 4 - draw(30);
      result[static_cast<size_t>(pairs + i)] = draw(5) == 0 ? 1 << 30 : draw(40) - 6;
    }
    return result;
  }

  std::minstd_rand engine_;
};

using Allocate = std::function<void*(size_t bytes)>;

// A drawn call in memory that the test lays out.
class Call {
 public:
  Call(const Case& c, const Allocate& allocate) : c_(c), allocate_(allocate) {
    vstar::FrameBackwardArgs& a = args_;
    a.type = c.type;
    a.batch = c.batch;
    a.heads = c.heads;
    a.key_heads = c.key_heads;
    a.head_dim = c.head_dim;
    a.query = random(a.query_strides = strides(c.queries, c.heads), 0);
    a.key = random(a.key_strides = strides(c.keys, c.key_heads), 1000);
    a.value = random(a.value_strides = strides(c.keys, c.key_heads), 2000);
    a.grad_out = random(a.grad_out_strides = a.query_strides, 3000);
    a.scale = 0.4f;
    if (!c.lengths.empty()) a.key_lengths = copy(c.lengths);
    a.stat = c.stat;
    a.clamp_negative = c.clamp;
    a.stat_strides = {c.queries * c.heads, 0, c.heads, 1};
    std::vector<float> stat(static_cast<size_t>(c.batch * c.queries * c.heads));
    for (size_t i = 0; i < stat.size(); ++i) stat[i] = c.numbers[(i + 77) % c.numbers.size()];
    if (c.stat == FrameStat::tensor) a.stat_tensor = copy(stat);
    const int64_t pairs = c.query_frames * c.key_frames;
    a.delta_head_stride = a.offset_head_stride = a.factor_head_stride = c.by_head ? pairs : 0;
    a.factor_sign_stride = pairs * (c.by_head ? c.heads : 1);
    if (!c.delta.empty()) a.delta = copy(c.delta);
    if (!c.offset.empty()) a.offset = copy(c.offset);
    if (!c.factor.empty()) a.factor = copy(c.factor);
    if (!c.span.empty()) a.factor_span = copy(c.span);
    if (!c.band.empty()) a.band = copy(c.band);
    a.out = result(a.out_strides = a.query_strides);
    a.grad_query = result(a.grad_query_strides = a.query_strides);
    a.grad_key = result(a.grad_key_strides = a.key_strides);
    a.grad_value = result(a.grad_value_strides = a.value_strides);
    const int64_t cells = c.batch * (c.by_head ? c.heads : 1) * c.query_frames * (c.key_frames + 1);
    map_ = static_cast<float*>(result_bytes(static_cast<size_t>(cells) * 4));
    std::vector<float> grad_map(static_cast<size_t>(cells));
    for (size_t i = 0; i < grad_map.size(); ++i) grad_map[i] = c.numbers[(i + 5) % 4099];
    a.map_by_head = c.by_head;
    grad_map_ = copy(grad_map);
  }

  // Computes the output, the map and the gradients, and returns all of their bytes.
  std::string run(const vstar::Threads& threads) {
    for (const auto& [data, bytes] : results_) std::memset(data, 0xff, bytes);
    const vstar::FrameRuns queries = {c_.query_runs.data(),
                                      static_cast<int64_t>(c_.query_runs.size()), c_.query_frames};
    const vstar::FrameRuns keys = {c_.key_runs.data(), static_cast<int64_t>(c_.key_runs.size()),
                                   c_.key_frames};
    CHECK(vstar::are_valid(queries, c_.queries), "a wrong layout");
    vstar::FrameArgs forward = args_;
    forward.queries.tokens = c_.queries;
    forward.keys.tokens = c_.keys;
    vstar::run_frames_forward(forward, queries, keys, {c_.has_map ? map_ : nullptr, c_.by_head},
                              threads);
    if (c_.has_gradients()) {
      vstar::FrameBackwardArgs backward = args_;
      backward.queries.tokens = c_.queries;
      backward.keys.tokens = c_.keys;
      backward.grad_map = c_.has_map ? grad_map_ : nullptr;
      vstar::run_frames_backward(backward, queries, keys, threads);
    }
    std::string all;
    for (const auto& [data, bytes] : results_) all.append(static_cast<char*>(data), bytes);
    return all;
  }

  const vstar::FrameBackwardArgs& args() const { return args_; }
  const float* map() const { return map_; }

 private:
  vstar::Strides strides(int64_t tokens, int64_t heads) const {
    const int64_t row = c_.head_dim + 3;  // a gap
    return {tokens * heads * row, 0, heads * row, row};
  }
  size_t element() const { return c_.type == ScalarType::float32 ? 4 : 2; }
  size_t bytes_of(const vstar::Strides& s) const {
    return static_cast<size_t>(c_.batch * s.batch - 3) * element();
  }
  void* random(const vstar::Strides& s, size_t first) {
    const size_t bytes = bytes_of(s);
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
  template <typename T>
  const T* copy(const std::vector<T>& x) {
    void* data = allocate_(x.size() * sizeof(T));
    std::memcpy(data, x.data(), x.size() * sizeof(T));
    return static_cast<T*>(data);
  }
  void* result_bytes(size_t bytes) {
    results_.push_back({allocate_(bytes), bytes});
    return results_.back().first;
  }
  void* result(const vstar::Strides& s) { return result_bytes(bytes_of(s)); }

  const Case& c_;
  const Allocate& allocate_;
  vstar::FrameBackwardArgs args_ = {};
  float* map_;
  const float* grad_map_;
  std::vector<std::pair<void*, size_t>> results_;
};

// The formula over all pairs of tokens, of a call in float32.
class Formula {
 public:
  Formula(const Case& c, const Call& call) : c_(c), a_(call.args()), map_(call.map()) {
    expand(c.query_runs, query_frame_, query_place_);
    expand(c.key_runs, key_frame_, key_place_);
  }

  void check(const char* name) {
    const int64_t maps = c_.batch * (c_.by_head ? c_.heads : 1), row = c_.key_frames + 1;
    std::vector<double> map(static_cast<size_t>(maps * c_.query_frames * row));
    double worst = 0;
    for (int64_t b = 0; b < c_.batch; ++b) {
      for (int64_t h = 0; h < c_.heads; ++h) {
        for (int64_t i = 0; i < c_.queries; ++i) {
          const std::vector<double> weights = weights_of(b, h, i);
          for (int64_t d = 0; d < c_.head_dim; ++d) {
            double sum = 0;
            for (int64_t j = 0; j < c_.keys; ++j) {
              sum += weights[at(j)] * value(a_.value, a_.value_strides, b, h / group(), j, d);
            }
            grow(worst, value(a_.out, a_.out_strides, b, h, i, d) - sum);
          }
          const int f = query_frame_[at(i)];
          if (f < 0) continue;
          const int64_t m = c_.by_head ? b * c_.heads + h : b;
          for (int64_t j = 0; j < c_.keys; ++j) {
            const int g = key_frame_[at(j)] < 0 ? static_cast<int>(c_.key_frames) : key_frame_[at(j)];
            map[at((m * c_.query_frames + f) * row + g)] +=
                weights[at(j)] / static_cast<double>(std::count(query_frame_.begin(),
                                                                query_frame_.end(), f)) /
                static_cast<double>(c_.by_head ? 1 : c_.heads);
          }
        }
      }
    }
    for (size_t i = 0; c_.has_map && i < map.size(); ++i) grow(worst, map_[i] - map[i]);
    CHECK(worst < 2e-5, "%s: error %g", name, worst);
  }

 private:
  static size_t at(int64_t i) { return static_cast<size_t>(i); }
  static void grow(double& worst, double error) {
    if (!(std::fabs(error) <= worst)) worst = std::isnan(error) ? INFINITY : std::fabs(error);
  }
  int64_t group() const { return c_.heads / c_.key_heads; }
  double value(const void* tensor, const vstar::Strides& s, int64_t b, int64_t h, int64_t token,
               int64_t d) const {
    return static_cast<const float*>(tensor)[b * s.batch + h * s.head + token * s.frame + d];
  }
  static void expand(const std::vector<FrameRun>& runs, std::vector<int>& frames,
                     std::vector<int64_t>& places) {
    for (const FrameRun& run : runs) {
      for (int32_t t = run.start; t < run.end; ++t) {
        frames.push_back(run.frame);
        places.push_back(run.index + t - run.start);
      }
    }
  }

  std::vector<double> weights_of(int64_t b, int64_t h, int64_t i) const {
    const int f = query_frame_[at(i)];
    const int64_t pairs = c_.query_frames * c_.key_frames;
    const int64_t head = c_.by_head ? h * pairs : 0;
    std::vector<double> x(at(c_.keys), -INFINITY), bias(at(c_.keys), 0), slope(at(c_.keys), 0);
    double largest = -INFINITY;
    std::vector<double> sums(at(c_.key_frames)), counts(at(c_.key_frames));
    for (int64_t j = 0; j < c_.keys; ++j) {
      const int g = key_frame_[at(j)];
      if (!c_.lengths.empty() && j >= c_.lengths[at(b)]) continue;
      double phi = 0;
      for (int64_t d = 0; d < c_.head_dim; ++d) {
        phi += value(a_.query, a_.query_strides, b, h, i, d) *
               value(a_.key, a_.key_strides, b, h / group(), j, d);
      }
      phi *= static_cast<double>(a_.scale);
      if (f < 0 || g < 0) {
        x[at(j)] = phi;
        continue;
      }
      const int64_t pair = f * c_.key_frames + g;
      const int64_t distance = key_place_[at(j)] - query_place_[at(i)];
      const auto within = [&](const std::vector<int32_t>& bounds) {
        return bounds.empty() ||
               (bounds[at(pair)] <= distance && distance <= bounds[at(pairs + pair)]);
      };
      if (!c_.factor.empty() && within(c_.span)) {
        phi *= c_.factor[at((phi > 0 ? 0 : a_.factor_sign_stride) + head + pair)];
      }
      const double offset = c_.offset.empty() ? 0.0 : c_.offset[at(head + pair)];
      if (offset == -INFINITY || !within(c_.band)) continue;
      x[at(j)] = phi;
      bias[at(j)] = offset;
      if (!c_.delta.empty()) slope[at(j)] = c_.delta[at(head + pair)];
      largest = std::max(largest, phi);
      sums[at(g)] += std::exp(phi);
      counts[at(g)] += 1;
    }
    double stat = 1;
    if (c_.stat == FrameStat::tensor) {
      stat = a_.stat_tensor[(b * c_.queries + i) * c_.heads + h];
    } else if (c_.stat != FrameStat::none) {
      stat = largest == -INFINITY ? 0 : largest;
      if (c_.stat == FrameStat::frame_max && largest != -INFINITY) {
        stat = -INFINITY;
        for (size_t g = 0; g < sums.size(); ++g) {
          if (counts[g] > 0) stat = std::max(stat, std::log(sums[g] / counts[g]));
        }
      }
    }
    if (c_.clamp && c_.stat != FrameStat::none) stat = std::max(stat, 0.0);
    double top = -INFINITY, total = 0;
    for (size_t j = 0; j < x.size(); ++j) top = std::max(top, x[j] += bias[j] + stat * slope[j]);
    for (double& y : x) total += y = top == -INFINITY ? 0 : std::exp(y - top);
    for (double& y : x) y = total > 0 ? y / total : 0;
    return x;
  }

  const Case& c_;
  const vstar::FrameBackwardArgs& a_;
  const float* map_;
  std::vector<int> query_frame_, key_frame_;
  std::vector<int64_t> query_place_, key_place_;
};

void test(const vstar::Kernels& kernels) {
  static std::deque<Guarded> blocks;
  while (blocks.size() < 24) blocks.emplace_back(size_t{1} << 20);
  vstar::select_kernels(kernels);
  for (unsigned seed = 1; seed <= 120; ++seed) {
    const Case c(seed);
    const std::string name = std::string(kernels.name) + " case " + std::to_string(seed);
    std::deque<std::unique_ptr<char[]>> heap;
    const Allocate exact = [&](size_t bytes) {
      heap.emplace_back(new char[bytes]);
      return heap.back().get();
    };
    Call plain(c, exact);
    const std::string expected = plain.run({1, on_one_thread});
    if (c.type == ScalarType::float32) Formula(c, plain).check(name.c_str());
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
