// Functions of each element, forward and backward; s is `sigmoid` of math.h. In gradients s and its rest 1 - s are
// quotients of e^-|x| and 1 by 1 + e^-|x|, so that neither is a difference.
#pragma once

#include <cstdint>

#include "dispatch.h"

namespace openbook {

using Pointwise = void (*)(const float* x, float* out, std::int64_t size);
using PointwiseGradient = void (*)(const float* grad, const float* x, float* dx, std::int64_t size);

struct ActivationKernels {
  Pointwise exp, log, tanh, erf, sigmoid;
  // dx = grad * (s * rest).
  PointwiseGradient sigmoid_backward;

  // u = x * fma(2 k c, x^2, 2 k) with k = sqrt(2 / pi) and c = 0.044715: out = x * s(u), as (1 + tanh(u / 2)) / 2 = s(u).
  Pointwise gelu_tanh;
  PointwiseGradient gelu_tanh_backward;
  // h = x / 2: out = fma(h, erf(x sqrt(1/2)), h).
  Pointwise gelu;
  PointwiseGradient gelu_backward;
  // out = x * s(1.702 x).
  Pointwise gelu_sigmoid;
  PointwiseGradient gelu_sigmoid_backward;

  // out = (gate * s(gate)) * up.
  void (*silu_mul)(const float* gate, const float* up, float* out, std::int64_t size);
  // dup = grad * (gate * s); dgate = (grad * up) * (s * fma(gate, rest, 1)).
  void (*silu_mul_backward)(const float* grad, const float* gate, const float* up, float* dgate, float* dup,
                            std::int64_t size);

  // gate_up: gate and up in turn, 2 size floats; g = min(gate, limit), u = up within -limit and limit:
  // out = (u + 1) * (g * s(alpha * g)).
  void (*clamped_swiglu)(const float* gate_up, float* out, std::int64_t size, float alpha, float limit);
  void (*clamped_swiglu_backward)(const float* grad, const float* gate_up, float* dgate_up, std::int64_t size,
                                  float alpha, float limit);
};

OPENBOOK_KERNELS(ActivationKernels, activation_kernels)

}  // namespace openbook
