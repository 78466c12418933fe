#include "softmax_kernels.h"

#include "lanes.h"

namespace openbook::OPENBOOK_ISA {
namespace {

// NaN may get lost here; it comes back from the sum of exponentials.
OPENBOOK_INLINE float row_max(const float* x, std::int64_t size) {
  const float least = -__builtin_inff();
  Vec largest = splat(least);
  for_lanes(size, [&](std::int64_t i, auto lanes) { largest = max(lanes.load_or(x + i, least), largest); });
  return max_lanes(largest);
}

// Writes exp(x - largest) to out unless it is null; returns their sum.
OPENBOOK_INLINE float exponentials(const float* x, float largest, float* out, std::int64_t size) {
  Vec sum = splat(0.0f);
  for_lanes(size, [&](std::int64_t i, auto lanes) {
    const Vec e = exp(sub(lanes.load(x + i), splat(largest)));
    if (out != nullptr) lanes.store(out + i, e);
    sum = add(sum, lanes.keep(e, 0.0f));
  });
  return sum_lanes(sum);
}

OPENBOOK_INLINE void scale(float* x, float factor, std::int64_t size) {
  for_lanes(size, [&](std::int64_t i, auto lanes) { lanes.store(x + i, mul(lanes.load(x + i), splat(factor))); });
}

void softmax(const float* x, float* out, std::int64_t size) {
  const float sum = exponentials(x, row_max(x, size), out, size);
  scale(out, 1.0f / sum, size);
}

void softmax_backward(const float* grad, const float* y, float* dx, std::int64_t size) {
  Vec products = splat(0.0f);
  for_lanes(size,
            [&](std::int64_t i, auto lanes) { products = fma(lanes.load(grad + i), lanes.load(y + i), products); });
  const Vec total = splat(sum_lanes(products));
  for_lanes(size, [&](std::int64_t i, auto lanes) {
    lanes.store(dx + i, mul(lanes.load(y + i), sub(lanes.load(grad + i), total)));
  });
}

float cross_entropy(const float* x, std::int64_t target, float* dx, std::int64_t size) {
  const float largest = row_max(x, size), at_target = x[target];
  const float sum = exponentials(x, largest, dx, size);
  if (dx != nullptr) {
    scale(dx, 1.0f / sum, size);
    dx[target] -= 1.0f;
  }
  return (largest + log(sum)) - at_target;
}

float sum(const float* x, std::int64_t size) {
  Vec total = splat(0.0f);
  for_lanes(size, [&](std::int64_t i, auto lanes) { total = add(total, lanes.load(x + i)); });
  return sum_lanes(total);
}

}  // namespace

extern const SoftmaxKernels softmax_kernels = {softmax, softmax_backward, cross_entropy, sum};

}  // namespace openbook::OPENBOOK_ISA
