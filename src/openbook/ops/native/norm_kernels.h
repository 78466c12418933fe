// Root mean square normalisation over the last axis.
#pragma once

#include <cstdint>

#include "dispatch.h"

namespace openbook {

struct NormKernels {
  // One row: out[i] = x[i] * (1 / sqrt(sum(x^2) / size + eps)) * weight[i]; returns the reciprocal root.
  // The sum of squares runs in 16 lanes (element i in lane i mod 16, ascending), then `sum_lanes`.
  float (*rms_norm_forward)(const float* x, const float* weight, float* out, std::int64_t size, float eps);
};

OPENBOOK_KERNELS(NormKernels, norm_kernels)

}  // namespace openbook
