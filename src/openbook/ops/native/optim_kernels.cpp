#include "optim_kernels.h"

#include "lanes.h"

namespace openbook::OPENBOOK_ISA {
namespace {

float squared_norm(const float* x, std::int64_t size) {
  Vec squares = splat(0.0f);
  for_lanes(size, [&](std::int64_t i, auto lanes) {
    const Vec a = lanes.load(x + i);
    squares = fma(a, a, squares);
  });
  return sum_lanes(squares);
}

void scale(float* x, float factor, std::int64_t size) {
  for_lanes(size, [&](std::int64_t i, auto lanes) { lanes.store(x + i, mul(lanes.load(x + i), splat(factor))); });
}

void adamw(float* w, float* m, float* v, const float* grad, const AdamWScalars& scalars, std::int64_t size) {
  const AdamWScalars s = scalars;
  for_lanes(size, [&](std::int64_t i, auto lanes) {
    const Vec g = lanes.load(grad + i), old_m = lanes.load(m + i);
    const Vec new_m = fma(splat(s.one_minus_beta1), sub(g, old_m), old_m);
    const Vec new_v = fma(mul(splat(s.one_minus_beta2), g), g, mul(splat(s.beta2), lanes.load(v + i)));
    const Vec root = add(div(sqrt(new_v), splat(s.root_bias)), splat(s.eps));
    lanes.store(m + i, new_m);
    lanes.store(v + i, new_v);
    lanes.store(w + i, fma(splat(-s.step), div(new_m, root), mul(lanes.load(w + i), splat(s.decay))));
  });
}

void momentum(float* m, const float* grad, float* ahead, float one_minus_momentum, float momentum, std::int64_t size) {
  for_lanes(size, [&](std::int64_t i, auto lanes) {
    const Vec g = lanes.load(grad + i), old_m = lanes.load(m + i);
    const Vec new_m = fma(splat(one_minus_momentum), sub(g, old_m), old_m);
    lanes.store(m + i, new_m);
    lanes.store(ahead + i, fma(splat(momentum), sub(new_m, g), g));
  });
}

void combine(const float* x, const float* y, float* out, float a, float b, std::int64_t size) {
  for_lanes(size, [&](std::int64_t i, auto lanes) {
    lanes.store(out + i, fma(splat(a), lanes.load(x + i), mul(splat(b), lanes.load(y + i))));
  });
}

}  // namespace

extern const OptimKernels optim_kernels = {squared_norm, scale, adamw, momentum, combine};

}  // namespace openbook::OPENBOOK_ISA
