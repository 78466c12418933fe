#include "norm_kernels.h"

#include "simd.h"

namespace openbook::OPENBOOK_ISA {
namespace {

float rms_norm_forward(const float* x, const float* weight, float* out, std::int64_t size, float eps) {
  const std::int64_t whole = size / kLanes * kLanes;
  const int rest = static_cast<int>(size - whole);
  Vec squares = splat(0.0f);
  for (std::int64_t i = 0; i < whole; i += kLanes) {
    const Vec a = load(x + i);
    squares = fma(a, a, squares);
  }
  if (rest != 0) {
    const Vec a = load_first(x + whole, rest);
    squares = fma(a, a, squares);
  }
  const float mean = sum_lanes(squares) / static_cast<float>(size);
  const float scale = 1.0f / __builtin_sqrtf(mean + eps);
  for (std::int64_t i = 0; i < whole; i += kLanes) {
    store(out + i, mul(mul(load(x + i), splat(scale)), load(weight + i)));
  }
  if (rest != 0) {
    const Vec a = mul(mul(load_first(x + whole, rest), splat(scale)), load_first(weight + whole, rest));
    store_first(out + whole, a, rest);
  }
  return scale;
}

}  // namespace

extern const NormKernels norm_kernels = {rms_norm_forward};

}  // namespace openbook::OPENBOOK_ISA
