// Softmax over the last axis, and its cross entropy. Sums run in 16 lanes (element i in lane i mod 16, ascending), then
// `sum_lanes`. A row that holds NaN or plus infinity, or nothing
// but minus infinity, gives NaN.
#pragma once

#include <cstdint>

#include "dispatch.h"

namespace openbook {

struct SoftmaxKernels {
  // One row: e = exp(x - max(x)); out = e * (1 / sum(e)). x may be out.
  void (*softmax)(const float* x, float* out, std::int64_t size);

  // One row: dx = y * (grad - sum(grad * y)).
  void (*softmax_backward)(const float* grad, const float* y, float* dx, std::int64_t size);

  // One row: returns (max(x) + ln sum(e)) - x[target]; unless null, dx is softmax(x) - 1 at the target, and may be x.
  float (*cross_entropy)(const float* x, std::int64_t target, float* dx, std::int64_t size);

  // sum(x) in 16 lanes.
  float (*sum)(const float* x, std::int64_t size);
};

OPENBOOK_KERNELS(SoftmaxKernels, softmax_kernels)

}  // namespace openbook
