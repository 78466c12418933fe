// Rotary embedding, halves paired, and its tables.
#pragma once

#include <cstdint>

#include "dispatch.h"

namespace openbook {

struct RopeKernels {
  // One head of `half` pairs: out[i] = fma(x[i], cos, -(x[i + half] * sin)), out[i + half] = fma(x[i + half], cos,
  // x[i] * sin). is_back turns the other way (the gradient): sin with its sign changed. x may be out.
  void (*rotate)(const float* x, const float* cos, const float* sin, float* out, std::int64_t half, bool is_back);

  // One position: cos and sin of position * frequencies[i], the product rounded to float32 (`cos_sin` in math.h).
  void (*table)(float position, const float* frequencies, float* cos, float* sin, std::int64_t size);
};

OPENBOOK_KERNELS(RopeKernels, rope_kernels)

}  // namespace openbook
