// Root mean square and layer normalisation over the last axis, forward and backward.
//
// Every sum along a row runs in 16 lanes (element i in lane i mod 16, ascending, fma for sums of products), then
// `sum_lanes`; the gradients of weight and bias add the rows up in ascending order, one fma or add each.
#pragma once

#include <cstdint>

#include "dispatch.h"

namespace openbook {

// Rows of floats that need not follow each other: row r begins at (r / inner) * outer_stride + (r % inner) * inner_stride.
struct Rows {
  const float* data;
  std::int64_t inner, inner_stride, outer_stride;
  // Always inlined: one copy for all instruction sets would be that of the greatest (see dispatch.h).
  __attribute__((always_inline)) const float* operator[](std::int64_t row) const {
    return inner == 1 ? data + row * outer_stride : data + row / inner * outer_stride + row % inner * inner_stride;
  }
};

struct NormKernels {
  // One row: scale = 1 / sqrt(sum(x^2) / size + eps), which is returned; out = (x * scale) * weight.
  float (*rms_norm_forward)(const float* x, const float* weight, float* out, std::int64_t size, float eps);

  // One row: y = x * scale, h = grad * weight, mean = sum(h * y) / size; dx = fma(-y, mean, h) * scale.
  void (*rms_norm_dx)(const float* grad, const float* x, const float* weight, float scale, float* dx, std::int64_t size);

  // Columns [begin, end) over all rows: dweight = fma(grad, x * scales[row], dweight), from 0.
  void (*rms_norm_dweight)(const float* grad, Rows x, const float* scales, float* dweight, std::int64_t num_rows,
                           std::int64_t size, std::int64_t begin, std::int64_t end);

  // One row: mean = sum(x) / size, scale = 1 / sqrt(sum((x - mean)^2) / size + eps), y = (x - mean) * scale;
  // out = fma(y, weight, bias), or y * weight where bias is null.
  void (*layer_norm_forward)(const float* x, const float* weight, const float* bias, float* out, float* mean,
                             float* scale, std::int64_t size, float eps);

  // One row: h = grad * weight, a = sum(h) / size, b = sum(h * y) / size; dx = fma(-y, b, h - a) * scale.
  void (*layer_norm_dx)(const float* grad, const float* x, const float* weight, float mean, float scale, float* dx,
                        std::int64_t size);

  // Columns [begin, end) over all rows: dweight = fma(grad, y, dweight) and, unless null, dbias += grad, from 0.
  void (*layer_norm_dweight)(const float* grad, const float* x, const float* means, const float* scales,
                             float* dweight, float* dbias, std::int64_t num_rows, std::int64_t size, std::int64_t begin,
                             std::int64_t end);
};

OPENBOOK_KERNELS(NormKernels, norm_kernels)

}  // namespace openbook
