// Fetches the next sequence's rows while the present one is computed.
//
// A sequence's rows lie a whole frame apart, so the hardware's stream prefetchers do not see them
// coming, and a burst of software prefetches overflows the miss buffers and is dropped. Spread over
// the microkernels' calls of the present sequence they arrive.
#pragma once

#include "types.h"

namespace vstar::VSTAR_ISA {

// The next sequence is fetched ahead when one of its tensors' rows take no more than this.
constexpr int64_t kPrefetchBytes = 64 << 10;

// One tensor's rows of a sequence; the stride is in bytes.
struct RowStream {
  const void* rows;
  int64_t stride;
};

class Prefetcher {
 public:
  // A prefetcher with nothing to fetch.
  Prefetcher() = default;

  // Fetches `rows` rows of `row_bytes` of each of the first `count` streams, in about `steps`
  // steps.
  template <int COUNT>
  Prefetcher(const RowStream (&streams)[COUNT], int64_t rows, int64_t row_bytes, int64_t steps,
             int count = COUNT)
      : count_(count),
        rows_(rows),
        row_bytes_(row_bytes),
        rows_per_step_(count * rows / steps + 1) {
    static_assert(COUNT <= kMaxStreams, "too many tensors");
    for (int t = 0; t < count; ++t) streams_[t] = streams[t];
    start_stream();
  }

  // Whole rows: the arithmetic of a short sequence is no more than keeping count of lines would be.
  void step() {
    for (int64_t left = rows_per_step_; left > 0; --left) {
      for (int64_t byte = 0; byte < row_bytes_; byte += kLineBytes) {
        __builtin_prefetch(row_ + byte, 0, kFetchLocality);
      }
      row_ += stride_;
      if (--rows_left_ == 0 && !next_stream()) return;
    }
  }

 private:
  static constexpr int64_t kLineBytes = 64;
  static constexpr int kMaxStreams = 7;

  bool next_stream() {
    if (++stream_ == count_) {
      rows_per_step_ = 0;
      return false;
    }
    start_stream();
    return true;
  }
  void start_stream() {
    row_ = static_cast<const char*>(streams_[stream_].rows);
    stride_ = streams_[stream_].stride;
    rows_left_ = rows_;
  }

  RowStream streams_[kMaxStreams];
  int count_ = 0, stream_ = 0;
  int64_t rows_ = 0, row_bytes_ = 0, rows_per_step_ = 0;
  const char* row_ = nullptr;
  int64_t stride_ = 0, rows_left_ = 0;
};

}  // namespace vstar::VSTAR_ISA
