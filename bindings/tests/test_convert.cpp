// 16-bit types in and out, over all their values: one frame's output is its value, converted there
// and back.
#include <cmath>
#include <cstring>
#include <vector>

#include "call.h"
#include "check.h"

namespace {

// Checks out = 1 * value for sequences of one frame: every bit pattern must come back.
void round_trip(const vstar::Kernels& kernels, vstar::ScalarType type) {
  constexpr int64_t kDim = 65536 / 64 + 3;  // 64 sequences; a partial vector at each one's end
  constexpr int64_t kSequences = 64;
  std::vector<uint16_t> zeros(kSequences * kDim), value(zeros.size()), out(zeros.size(), 0xffff);
  for (size_t i = 0; i < value.size(); ++i) value[i] = static_cast<uint16_t>(i);
  vstar::ForwardArgs a = {};
  a.type = type;
  a.batch = kSequences;
  a.space = a.frames = a.heads = a.queries_per_item = 1;
  a.head_dim = kDim;
  a.query = a.key = zeros.data();
  a.value = value.data();
  a.out = out.data();
  a.query_strides = a.key_strides = a.value_strides = a.out_strides = {kDim, 0, kDim, kDim};
  a.scale = 1;
  std::vector<float> scratch(static_cast<size_t>(kernels.forward_scratch(a)), NAN);
  kernels.forward(a, 0, kSequences, scratch.data());
  for (size_t i = 0; i < value.size(); ++i) {
    if (is_nan(type, value[i])) {
      CHECK(is_nan(type, out[i]), "%s: NaN %04x became %04x", kernels.name, value[i], out[i]);
    } else {
      // -0 may come back as +0: it was added to +0. The instruction for bfloat16 makes zero of what
      // is below 2^-126.
      const bool has_instruction = std::strcmp(kernels.name, "avx512_bf16") == 0;
      const uint16_t least = has_instruction && type == vstar::ScalarType::bfloat16 ? 0x80 : 1;
      const bool zero = (value[i] & 0x7fff) < least;
      CHECK(zero ? (out[i] & 0x7fff) == 0 : out[i] == value[i], "%s: %04x became %04x",
            kernels.name, value[i], out[i]);
    }
  }
}

// Checks two frames with equal logits: the mean of two neighbours lies half way, and rounds to
// even.
void round_to_even(const vstar::Kernels& kernels, vstar::ScalarType type) {
  const uint16_t one = type == vstar::ScalarType::bfloat16 ? 0x3f80 : 0x3c00;
  constexpr int64_t kDim = 37;
  std::vector<uint16_t> zeros(2 * kDim), value(zeros.size()), out(zeros.size(), 0xffff);
  for (int64_t d = 0; d < kDim; ++d) {
    value[d] = static_cast<uint16_t>(one + d);
    value[kDim + d] = static_cast<uint16_t>(one + d + 1);
  }
  vstar::ForwardArgs a = {};
  a.type = type;
  a.batch = a.space = a.heads = 1;
  a.frames = a.queries_per_item = 2;
  a.head_dim = kDim;
  a.query = a.key = zeros.data();
  a.value = value.data();
  a.out = out.data();
  a.query_strides = a.key_strides = a.value_strides = a.out_strides = {0, 0, kDim, 0};
  a.scale = 1;
  std::vector<float> scratch(static_cast<size_t>(kernels.forward_scratch(a)), NAN);
  kernels.forward(a, 0, 1, scratch.data());
  for (int64_t i = 0; i < 2 * kDim; ++i) {
    const uint16_t low = static_cast<uint16_t>(one + i % kDim);
    const uint16_t even = low % 2 == 0 ? low : static_cast<uint16_t>(low + 1);
    CHECK(out[i] == even, "%s: between %04x and its neighbour came %04x", kernels.name, low,
          out[i]);
  }
}

}  // namespace

int main() {
  for_each_isa([](const vstar::Kernels& kernels) {
    for (auto type : {vstar::ScalarType::bfloat16, vstar::ScalarType::float16}) {
      round_trip(kernels, type);
      round_to_even(kernels, type);
    }
  });
  return finish();
}
