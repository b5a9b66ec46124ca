// Fetches the next sequence's rows while the present one is computed.
//
// A sequence's rows lie a whole frame apart, so the hardware's stream prefetchers do not see them
// coming, and a burst of software prefetches overflows the miss buffers and is dropped. Spread over
// the microkernel calls of the present sequence they arrive.
#pragma once

#include "types.h"

namespace vstar::VSTAR_ISA {

class Prefetcher {
 public:
  // Nothing to fetch.
  Prefetcher() = default;

  // Fetches `frames` rows of `row_bytes` in each of four tensors, in about `steps` steps.
  Prefetcher(const void* const (&rows)[4], const int64_t (&strides)[4], int64_t frames,
             int64_t row_bytes, int64_t steps)
      : frames_(frames), row_bytes_(row_bytes) {
    for (int t = 0; t < 4; ++t) {
      rows_[t] = static_cast<const char*>(rows[t]);
      strides_[t] = strides[t];
    }
    const int64_t lines_per_row = (row_bytes + kLineBytes - 1) / kLineBytes;
    per_step_ = 4 * frames * lines_per_row / steps + 1;
  }

  void step() {
    for (int64_t i = 0; i < per_step_; ++i) {
      prefetch(rows_[tensor_] + frame_ * strides_[tensor_] + byte_);
      byte_ += kLineBytes;
      if (byte_ < row_bytes_) continue;
      byte_ = 0;
      if (++frame_ < frames_) continue;
      frame_ = 0;
      if (++tensor_ < 4) continue;
      per_step_ = 0;
    }
  }

 private:
  static constexpr int64_t kLineBytes = 64;

  const char* rows_[4] = {};
  int64_t strides_[4] = {};  // bytes
  int64_t frames_ = 0, row_bytes_ = 0, per_step_ = 0;
  int64_t frame_ = 0, byte_ = 0;
  int tensor_ = 0;
};

}  // namespace vstar::VSTAR_ISA
