// The optimizer's arithmetic: norms, AdamW, and Muon but for its matrix products. Scalars are rounded to float32 by the
// caller.
#pragma once

#include <cstdint>

#include "dispatch.h"

namespace openbook {

struct AdamWScalars {
  // w is multiplied by `decay`; m and v move by 1 - beta; the update is step * m / (sqrt(v) / root_bias + eps).
  float decay, one_minus_beta1, beta2, one_minus_beta2, root_bias, eps, step;
};

struct OptimKernels {
  // sum(x^2) in 16 lanes (element i in lane i mod 16, ascending, fma), then `sum_lanes`.
  float (*squared_norm)(const float* x, std::int64_t size);

  // x *= factor.
  void (*scale)(float* x, float factor, std::int64_t size);

  // m = fma(1 - beta1, g - m, m); v = fma((1 - beta2) g, g, beta2 v);
  // w = fma(-step, m / (sqrt(v) / root_bias + eps), w * decay).
  void (*adamw)(float* w, float* m, float* v, const float* grad, const AdamWScalars& scalars, std::int64_t size);

  // m = fma(1 - momentum, g - m, m); ahead = fma(momentum, m - g, g).
  void (*momentum)(float* m, const float* grad, float* ahead, float one_minus_momentum, float momentum,
                   std::int64_t size);

  // out = fma(a, x, b * y); out may be x or y.
  void (*combine)(const float* x, const float* y, float* out, float a, float b, std::int64_t size);
};

OPENBOOK_KERNELS(OptimKernels, optim_kernels)

}  // namespace openbook
