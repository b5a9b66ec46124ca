// Runs a call of frame_attention: sorts its tokens by frame, cuts it into blocks of queries, shares
// those out among threads, and adds up the map.
#pragma once

#include "frames.h"
#include "schedule.h"

namespace vstar {

// A run of tokens of one frame: its tokens [start, end) are of that frame (-1: text), and the first
// one has the place `index` among its frame's, which for text means nothing.
struct FrameRun {
  int32_t start, end, frame, index;
};

// The runs of a sequence, in order and without holes.
struct FrameRuns {
  const FrameRun* runs;
  int64_t count, frames;
};

// Returns whether runs cover so many tokens, and count their frames' tokens without a gap.
bool are_valid(const FrameRuns& runs, int64_t tokens);

// Where the map goes: the means over heads, or each head's own. Null: it is not wanted.
struct FrameMap {
  float* data;  // (batch, [heads,] query frames, key frames + 1)
  bool per_head;
};

// Computes `out`, and the map. Sets what the caller leaves open of the arguments: the orders of
// tokens but for their numbers, and all that is about blocks and the map.
void run_frames_forward(FrameArgs& args, const FrameRuns& queries, const FrameRuns& keys,
                        const FrameMap& map, const Threads& threads);

// Computes the gradients. Sets what the caller leaves open, as above.
void run_frames_backward(FrameBackwardArgs& args, const FrameRuns& queries, const FrameRuns& keys,
                         const Threads& threads);

}  // namespace vstar
