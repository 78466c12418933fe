#include "activation_kernels.h"

#include "lanes.h"

namespace openbook::OPENBOOK_ISA {
namespace {

constexpr float kRoot2OverPi = 0x1.988454p-1f;  // sqrt(2 / pi)
constexpr float kCube = 0.044715f;
constexpr float kRootHalf = 0x1.6a09e6p-1f;      // sqrt(1 / 2)
constexpr float kNormalTop = 0x1.988454p-2f;     // 1 / sqrt(2 pi)
constexpr float kQuick = 1.702f;

OPENBOOK_INLINE Vec one() { return splat(1.0f); }

template <typename F>
OPENBOOK_INLINE void map(const float* x, float* out, std::int64_t size, F f) {
  for_lanes(size, [&](std::int64_t i, auto lanes) { lanes.store(out + i, f(lanes.load(x + i))); });
}

// dx = grad * slope(x).
template <typename F>
OPENBOOK_INLINE void map_gradient(const float* grad, const float* x, float* dx, std::int64_t size, F slope) {
  for_lanes(size, [&](std::int64_t i, auto lanes) {
    lanes.store(dx + i, mul(lanes.load(grad + i), slope(lanes.load(x + i))));
  });
}

void exp_all(const float* x, float* out, std::int64_t size) {
  map(x, out, size, [](Vec a) { return exp(a); });
}
void log_all(const float* x, float* out, std::int64_t size) {
  for (std::int64_t i = 0; i < size; ++i) out[i] = log(x[i]);
}
void tanh_all(const float* x, float* out, std::int64_t size) {
  map(x, out, size, [](Vec a) { return tanh(a); });
}
void erf_all(const float* x, float* out, std::int64_t size) {
  map(x, out, size, [](Vec a) { return erf(a); });
}
void sigmoid_all(const float* x, float* out, std::int64_t size) {
  map(x, out, size, [](Vec a) { return sigmoid(a); });
}
// s = sigmoid(x) and 1 - s, each with its own small relative error: a difference of what is nearly equal has none.
struct Shares {
  Vec s, rest;
};
OPENBOOK_INLINE Shares shares(Vec x) {
  const Vec e = exp(neg(abs(x))), total = add(e, one());
  const Mask is_below = less(x, splat(0.0f));
  return {div(select(is_below, e, one()), total), div(select(is_below, one(), e), total)};
}
// The slope of y s(y) where y = x or a multiple of it: s (1 + y (1 - s)).
OPENBOOK_INLINE Vec swish_slope(Vec y, Shares of_y) { return mul(of_y.s, fma(y, of_y.rest, one())); }

void sigmoid_backward(const float* grad, const float* x, float* dx, std::int64_t size) {
  map_gradient(grad, x, dx, size, [](Vec a) {
    const Shares of_a = shares(a);
    return mul(of_a.s, of_a.rest);
  });
}

OPENBOOK_INLINE Vec gelu_tanh_argument(Vec a) {
  return mul(a, fma(splat(2.0f * kRoot2OverPi * kCube), mul(a, a), splat(2.0f * kRoot2OverPi)));
}
void gelu_tanh(const float* x, float* out, std::int64_t size) {
  map(x, out, size, [](Vec a) { return mul(a, sigmoid(gelu_tanh_argument(a))); });
}
void gelu_tanh_backward(const float* grad, const float* x, float* dx, std::int64_t size) {
  // With s = s(u): s (1 + x du/dx (1 - s)).
  map_gradient(grad, x, dx, size, [](Vec a) {
    const Shares of_u = shares(gelu_tanh_argument(a));
    const Vec slope = fma(splat(6.0f * kRoot2OverPi * kCube), mul(a, a), splat(2.0f * kRoot2OverPi));
    return mul(of_u.s, fma(mul(a, slope), of_u.rest, one()));
  });
}

void gelu(const float* x, float* out, std::int64_t size) {
  map(x, out, size, [](Vec a) {
    const Vec half = mul(a, splat(0.5f));
    return fma(half, erf(mul(a, splat(kRootHalf))), half);
  });
}
void gelu_backward(const float* grad, const float* x, float* dx, std::int64_t size) {
  // (1 + erf(x / sqrt 2)) / 2 + x e^(-x^2 / 2) / sqrt(2 pi).
  map_gradient(grad, x, dx, size, [](Vec a) {
    const Vec density = mul(splat(kNormalTop), exp(mul(mul(a, a), splat(-0.5f))));
    return fma(a, density, fma(erf(mul(a, splat(kRootHalf))), splat(0.5f), splat(0.5f)));
  });
}

void gelu_sigmoid(const float* x, float* out, std::int64_t size) {
  map(x, out, size, [](Vec a) { return mul(a, sigmoid(mul(a, splat(kQuick)))); });
}
void gelu_sigmoid_backward(const float* grad, const float* x, float* dx, std::int64_t size) {
  map_gradient(grad, x, dx, size, [](Vec a) {
    const Vec scaled = mul(a, splat(kQuick));
    return swish_slope(scaled, shares(scaled));
  });
}

void silu_mul(const float* gate, const float* up, float* out, std::int64_t size) {
  for_lanes(size, [&](std::int64_t i, auto lanes) {
    const Vec g = lanes.load(gate + i);
    lanes.store(out + i, mul(mul(g, sigmoid(g)), lanes.load(up + i)));
  });
}
void silu_mul_backward(const float* grad, const float* gate, const float* up, float* dgate, float* dup,
                       std::int64_t size) {
  for_lanes(size, [&](std::int64_t i, auto lanes) {
    const Vec d = lanes.load(grad + i), g = lanes.load(gate + i);
    const Shares of_g = shares(g);
    lanes.store(dgate + i, mul(mul(d, lanes.load(up + i)), swish_slope(g, of_g)));
    lanes.store(dup + i, mul(d, mul(g, of_g.s)));
  });
}

// Gate and up of 16 or fewer pairs, put apart.
struct Pairs {
  float gate[kLanes] = {}, up[kLanes] = {};
  Pairs(const float* gate_up, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) {
      gate[i] = gate_up[2 * i];
      up[i] = gate_up[2 * i + 1];
    }
  }
};

void clamped_swiglu(const float* gate_up, float* out, std::int64_t size, float alpha, float limit) {
  for_lanes(size, [&](std::int64_t i, auto lanes) {
    const Pairs pairs(gate_up + 2 * i, size - i < kLanes ? size - i : kLanes);
    // The operands' order keeps NaN.
    const Vec g = min(splat(limit), load(pairs.gate));
    const Vec u = max(splat(-limit), min(splat(limit), load(pairs.up)));
    lanes.store(out + i, mul(add(u, one()), mul(g, sigmoid(mul(g, splat(alpha))))));
  });
}
void clamped_swiglu_backward(const float* grad, const float* gate_up, float* dgate_up, std::int64_t size, float alpha,
                             float limit) {
  for_lanes(size, [&](std::int64_t i, auto lanes) {
    const std::int64_t n = size - i < kLanes ? size - i : kLanes;
    const Pairs pairs(gate_up + 2 * i, n);
    const Vec gate = load(pairs.gate), up = load(pairs.up), d = lanes.load(grad + i);
    const Vec g = min(splat(limit), gate), u = max(splat(-limit), min(splat(limit), up));
    const Vec scaled = mul(g, splat(alpha)), zero = splat(0.0f);
    const Shares of_g = shares(scaled);
    const Vec dg = mul(mul(d, add(u, one())), swish_slope(scaled, of_g));
    float dgate[kLanes], dup[kLanes];
    // Nothing passes where a value was cut off.
    store(dgate, select(less(splat(limit), gate), zero, dg));
    store(dup, select(less(splat(limit), abs(up)), zero, mul(d, mul(g, of_g.s))));
    for (std::int64_t j = 0; j < n; ++j) {
      dgate_up[2 * (i + j)] = dgate[j];
      dgate_up[2 * (i + j) + 1] = dup[j];
    }
  });
}

}  // namespace

extern const ActivationKernels activation_kernels = {
    exp_all,      log_all,       tanh_all,     erf_all,           sigmoid_all,
    sigmoid_backward, gelu_tanh, gelu_tanh_backward, gelu,        gelu_backward,
    gelu_sigmoid, gelu_sigmoid_backward, silu_mul, silu_mul_backward, clamped_swiglu,
    clamped_swiglu_backward};

}  // namespace openbook::OPENBOOK_ISA
