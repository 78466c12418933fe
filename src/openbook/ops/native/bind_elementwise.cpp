#include "activation_kernels.h"
#include "bindings.h"
#include "rope_kernels.h"
#include "thread_pool.h"

namespace openbook {
namespace {

// Elements that a task should have at least.
constexpr std::int64_t kGrain = 4096;

using PointwiseMember = Pointwise ActivationKernels::*;
using GradientMember = PointwiseGradient ActivationKernels::*;

template <PointwiseMember Kernel>
void pointwise(ConstFloats1 x, Floats1 out) {
  if (x.shape(0) != out.shape(0)) throw nb::value_error("expected x [n] and out [n]");
  const float* xs = x.data();
  float* outs = out.data();
  const std::int64_t size = static_cast<std::int64_t>(x.shape(0));
  const nb::gil_scoped_release release;
  const auto kernel = activation_kernels().*Kernel;
  parallel_ranges(size, kGrain,
                  [=](std::int64_t begin, std::int64_t end) { kernel(xs + begin, outs + begin, end - begin); });
}

template <GradientMember Kernel>
void pointwise_gradient(ConstFloats1 grad, ConstFloats1 x, Floats1 dx) {
  if (x.shape(0) != dx.shape(0) || grad.shape(0) != x.shape(0)) {
    throw nb::value_error("expected grad [n], x [n] and dx [n]");
  }
  const float *gs = grad.data(), *xs = x.data();
  float* dxs = dx.data();
  const std::int64_t size = static_cast<std::int64_t>(x.shape(0));
  const nb::gil_scoped_release release;
  const auto kernel = activation_kernels().*Kernel;
  parallel_ranges(size, kGrain, [=](std::int64_t begin, std::int64_t end) {
    kernel(gs + begin, xs + begin, dxs + begin, end - begin);
  });
}

template <PointwiseMember Kernel>
void bind_pointwise(nb::module_& m, const char* name) {
  m.def(name, &pointwise<Kernel>, nb::arg("x"), nb::arg("out"), "Of each element: float32 x [n] to out [n].");
}

template <GradientMember Kernel>
void bind_gradient(nb::module_& m, const char* name) {
  m.def(name, &pointwise_gradient<Kernel>, nb::arg("grad"), nb::arg("x"), nb::arg("dx"),
        "Of each element: float32 grad [n] and x [n] to dx [n].");
}

// Rows of pairs: [M, 2 D] beside [M, D].
void check_pairs(std::size_t rows, std::size_t width, std::size_t other_rows, std::size_t half) {
  if (rows != other_rows || width != 2 * half) throw nb::value_error("expected gate_up [M, 2 D] and out [M, D]");
}

void silu_mul_forward(ConstFloats2 gate_up, Floats2 out) {
  check_pairs(gate_up.shape(0), gate_up.shape(1), out.shape(0), out.shape(1));
  const float* xs = gate_up.data();
  float* outs = out.data();
  const std::int64_t rows = static_cast<std::int64_t>(out.shape(0)), size = static_cast<std::int64_t>(out.shape(1));
  const nb::gil_scoped_release release;
  const auto kernel = activation_kernels().silu_mul;
  parallel_ranges(rows, kGrain / (size + 1) + 1, [=](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      kernel(xs + 2 * row * size, xs + (2 * row + 1) * size, outs + row * size, size);
    }
  });
}

void silu_mul_backward(ConstFloats2 grad, ConstFloats2 gate_up, Floats2 dgate_up) {
  check_pairs(gate_up.shape(0), gate_up.shape(1), grad.shape(0), grad.shape(1));
  check_pairs(dgate_up.shape(0), dgate_up.shape(1), grad.shape(0), grad.shape(1));
  const float *gs = grad.data(), *xs = gate_up.data();
  float* dxs = dgate_up.data();
  const std::int64_t rows = static_cast<std::int64_t>(grad.shape(0)), size = static_cast<std::int64_t>(grad.shape(1));
  const nb::gil_scoped_release release;
  const auto kernel = activation_kernels().silu_mul_backward;
  parallel_ranges(rows, kGrain / (size + 1) + 1, [=](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      const std::int64_t gate = 2 * row * size, up = gate + size;
      kernel(gs + row * size, xs + gate, xs + up, dxs + gate, dxs + up, size);
    }
  });
}

void clamped_swiglu_forward(ConstFloats1 gate_up, Floats1 out, float alpha, float limit) {
  check_pairs(1, gate_up.shape(0), 1, out.shape(0));
  const float* xs = gate_up.data();
  float* outs = out.data();
  const std::int64_t size = static_cast<std::int64_t>(out.shape(0));
  const nb::gil_scoped_release release;
  const auto kernel = activation_kernels().clamped_swiglu;
  parallel_ranges(size, kGrain, [=](std::int64_t begin, std::int64_t end) {
    kernel(xs + 2 * begin, outs + begin, end - begin, alpha, limit);
  });
}

void clamped_swiglu_backward(ConstFloats1 grad, ConstFloats1 gate_up, Floats1 dgate_up, float alpha, float limit) {
  check_pairs(1, gate_up.shape(0), 1, grad.shape(0));
  check_pairs(1, dgate_up.shape(0), 1, grad.shape(0));
  const float *gs = grad.data(), *xs = gate_up.data();
  float* dxs = dgate_up.data();
  const std::int64_t size = static_cast<std::int64_t>(grad.shape(0));
  const nb::gil_scoped_release release;
  const auto kernel = activation_kernels().clamped_swiglu_backward;
  parallel_ranges(size, kGrain, [=](std::int64_t begin, std::int64_t end) {
    kernel(gs + begin, xs + 2 * begin, dxs + 2 * begin, end - begin, alpha, limit);
  });
}

using StridedHeads = nb::ndarray<const float, nb::ndim<3>, nb::device::cpu>;

void rope(StridedHeads x, ConstFloats2 cos, ConstFloats2 sin, Floats3 out, bool is_back) {
  const std::int64_t rows = static_cast<std::int64_t>(out.shape(0)), heads = static_cast<std::int64_t>(out.shape(1));
  const std::int64_t size = static_cast<std::int64_t>(out.shape(2)), half = size / 2;
  bool is_right = size == 2 * half && (size <= 1 || x.stride(2) == 1);
  for (int axis = 0; axis < 3; ++axis) is_right = is_right && x.shape(axis) == out.shape(axis);
  for (const ConstFloats2& table : {cos, sin}) {
    is_right = is_right && table.shape(0) == out.shape(0) && 2 * table.shape(1) == out.shape(2);
  }
  if (!is_right) throw nb::value_error("rope: expected x and out [R, N, H], H even and contiguous, cos and sin [R, H/2]");
  const float *xs = x.data(), *cs = cos.data(), *ss = sin.data();
  float* outs = out.data();
  const std::int64_t row_stride = x.stride(0), head_stride = x.stride(1);
  const nb::gil_scoped_release release;
  const auto kernel = rope_kernels().rotate;
  parallel_ranges(rows, kGrain / (heads * size + 1) + 1, [=](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      for (std::int64_t head = 0; head < heads; ++head) {
        kernel(xs + row * row_stride + head * head_stride, cs + row * half, ss + row * half,
               outs + (row * heads + head) * size, half, is_back);
      }
    }
  });
}

void rope_tables(ConstFloats1 positions, ConstFloats1 frequencies, Floats2 cos, Floats2 sin) {
  for (const Floats2& table : {cos, sin}) {
    if (table.shape(0) != positions.shape(0) || table.shape(1) != frequencies.shape(0)) {
      throw nb::value_error("rope_tables: expected positions [R], frequencies [J], cos and sin [R, J]");
    }
  }
  const float *ps = positions.data(), *fs = frequencies.data();
  float *cs = cos.data(), *ss = sin.data();
  const std::int64_t rows = static_cast<std::int64_t>(cos.shape(0)), size = static_cast<std::int64_t>(cos.shape(1));
  const nb::gil_scoped_release release;
  const auto kernel = rope_kernels().table;
  parallel_ranges(rows, 512 / (size + 1) + 1, [=](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) kernel(ps[row], fs, cs + row * size, ss + row * size, size);
  });
}

}  // namespace

void bind_elementwise(nb::module_& m) {
  using K = ActivationKernels;
  bind_pointwise<&K::exp>(m, "exp");
  bind_pointwise<&K::log>(m, "log");
  bind_pointwise<&K::tanh>(m, "tanh");
  bind_pointwise<&K::erf>(m, "erf");
  bind_pointwise<&K::sigmoid>(m, "sigmoid_forward");
  bind_gradient<&K::sigmoid_backward>(m, "sigmoid_backward");
  bind_pointwise<&K::gelu_tanh>(m, "gelu_tanh_forward");
  bind_gradient<&K::gelu_tanh_backward>(m, "gelu_tanh_backward");
  bind_pointwise<&K::gelu>(m, "gelu_forward");
  bind_gradient<&K::gelu_backward>(m, "gelu_backward");
  bind_pointwise<&K::gelu_sigmoid>(m, "gelu_sigmoid_forward");
  bind_gradient<&K::gelu_sigmoid_backward>(m, "gelu_sigmoid_backward");
  m.def("silu_mul_forward", &silu_mul_forward, nb::arg("gate_up"), nb::arg("out"),
        "float32 gate_up [M, 2 D], gate first, to out [M, D].");
  m.def("silu_mul_backward", &silu_mul_backward, nb::arg("grad"), nb::arg("gate_up"), nb::arg("dgate_up"),
        "grad [M, D] and gate_up [M, 2 D] to dgate_up [M, 2 D].");
  m.def("clamped_swiglu_forward", &clamped_swiglu_forward, nb::arg("gate_up"), nb::arg("out"), nb::arg("alpha"),
        nb::arg("limit"), "float32 gate_up [2 n], in turn, to out [n].");
  m.def("clamped_swiglu_backward", &clamped_swiglu_backward, nb::arg("grad"), nb::arg("gate_up"), nb::arg("dgate_up"),
        nb::arg("alpha"), nb::arg("limit"), "grad [n] and gate_up [2 n] to dgate_up [2 n].");
  m.def("rope", &rope, nb::arg("x"), nb::arg("cos"), nb::arg("sin"), nb::arg("out"), nb::arg("is_back"),
        "float32 x [R, N, H], of any strides but the last, turned by cos and sin [R, H/2] to out [R, N, H].");
  m.def("rope_tables", &rope_tables, nb::arg("positions"), nb::arg("frequencies"), nb::arg("cos"), nb::arg("sin"),
        "float32 positions [R] and frequencies [J] to cos and sin [R, J] of their products.");
}

}  // namespace openbook
