// The softmax's exponential: to float32 rounding over its range, zero below it, NaN for NaN.
#include <cmath>
#include <limits>
#include <vector>

#include "check.h"

int main() {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  for_each_isa([&](const vstar::Kernels& kernels) {
    std::vector<float> in;
    for (double x = -126.0; x <= 0.0; x += 1.0 / 4096) in.push_back(static_cast<float>(x));
    for (float x = -1e-30f; x > -0.1f; x *= 1.01f) in.push_back(x);
    std::vector<float> out(in.size(), NAN);
    kernels.exp2(in.data(), out.data(), static_cast<int64_t>(in.size()));
    double worst = 0;
    for (size_t i = 0; i < in.size(); ++i) {
      const double exact = std::exp2(static_cast<double>(in[i]));
      const double ulps = std::fabs(out[i] - exact) / (exact * std::ldexp(1.0, -23));
      if (!(ulps <= worst)) worst = ulps;
    }
    CHECK(worst < 1.0, "%s is %.3f ulp off", kernels.name, worst);

    const float edges[] = {0.0f, -0.0f, -126.1f, -126.5f, -127.0f, -1e4f, -kInfinity, NAN};
    float results[8];
    kernels.exp2(edges, results, 8);
    CHECK(results[0] == 1.0f && results[1] == 1.0f, "2^0 is %g, %g", results[0], results[1]);
    for (int i = 2; i < 7; ++i) CHECK(results[i] == 0.0f, "2^%g is %g", edges[i], results[i]);
    CHECK(std::isnan(results[7]), "2^NaN is %g", results[7]);
  });
  return finish();
}
