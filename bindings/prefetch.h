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

  // Fetches `frames` rows of `row_bytes` of each stream, in about `steps` steps.
  template <int COUNT>
  Prefetcher(const RowStream (&streams)[COUNT], int64_t frames, int64_t row_bytes, int64_t steps)
      : count_(COUNT), frames_(frames), row_bytes_(row_bytes) {
    static_assert(COUNT <= kMaxStreams, "too many tensors");
    for (int t = 0; t < COUNT; ++t) streams_[t] = streams[t];
    const int64_t lines_per_row = (row_bytes + kLineBytes - 1) / kLineBytes;
    per_step_ = COUNT * frames * lines_per_row / steps + 1;
    start_row();
  }

  void step() {
    for (int64_t left = per_step_; left > 0; --left) {
      prefetch(line_);
      line_ += kLineBytes;
      if (line_ >= row_end_ && !next_row()) return;
    }
  }

 private:
  static constexpr int64_t kLineBytes = 64;
  static constexpr int kMaxStreams = 7;

  bool next_row() {
    if (++frame_ == frames_) {
      frame_ = 0;
      if (++stream_ == count_) {
        per_step_ = 0;
        return false;
      }
    }
    start_row();
    return true;
  }
  void start_row() {
    const RowStream& stream = streams_[stream_];
    line_ = static_cast<const char*>(stream.rows) + frame_ * stream.stride;
    row_end_ = line_ + row_bytes_;
  }

  RowStream streams_[kMaxStreams];
  int count_ = 0, stream_ = 0;
  int64_t frames_ = 0, row_bytes_ = 0, per_step_ = 0, frame_ = 0;
  const char *line_ = nullptr, *row_end_ = nullptr;
};

}  // namespace vstar::VSTAR_ISA
