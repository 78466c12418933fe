#include "rope_kernels.h"

#include "lanes.h"

namespace openbook::OPENBOOK_ISA {
namespace {

void rotate(const float* x, const float* cos, const float* sin, float* out, std::int64_t half, bool is_back) {
  for_lanes(half, [&](std::int64_t i, auto lanes) {
    const Vec a = lanes.load(x + i), b = lanes.load(x + half + i);
    const Vec c = lanes.load(cos + i), plain = lanes.load(sin + i), s = is_back ? neg(plain) : plain;
    lanes.store(out + i, fma(a, c, neg(mul(b, s))));
    lanes.store(out + half + i, fma(b, c, mul(a, s)));
  });
}

void table(float position, const float* frequencies, float* cos, float* sin, std::int64_t size) {
  for (std::int64_t i = 0; i < size; ++i) cos_sin(position * frequencies[i], cos + i, sin + i);
}

}  // namespace

extern const RopeKernels rope_kernels = {rotate, table};

}  // namespace openbook::OPENBOOK_ISA
