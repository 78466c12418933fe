#include <nanobind/stl/vector.h>

#include <cmath>
#include <initializer_list>
#include <vector>

#include "bindings.h"
#include "optim_kernels.h"
#include "thread_pool.h"

namespace openbook {
namespace {

// Elements that a task should have at least.
constexpr std::int64_t kGrain = 16384;

std::int64_t size_of(const Floats1& x) { return static_cast<std::int64_t>(x.shape(0)); }

void check_sizes(std::initializer_list<std::size_t> sizes) {
  for (const std::size_t size : sizes) {
    if (size != *sizes.begin()) throw nb::value_error("expected arrays of one size");
  }
}

float norm(const std::vector<ConstFloats1>& arrays) {
  struct Part {
    const float* data;
    std::int64_t size;
  };
  std::vector<Part> parts;
  for (const ConstFloats1& array : arrays) parts.push_back({array.data(), static_cast<std::int64_t>(array.shape(0))});
  std::vector<float> squares(arrays.size());
  const nb::gil_scoped_release release;
  const auto kernel = optim_kernels().squared_norm;
  parallel_for(static_cast<std::int64_t>(parts.size()), [&](std::int64_t i) {
    const std::size_t at = static_cast<std::size_t>(i);
    squares[at] = kernel(parts[at].data, parts[at].size);
  });
  const FloatMode mode;
  float total = 0.0f;
  for (const float square : squares) total += square;
  return std::sqrt(total);
}

void scale(Floats1 x, float factor) {
  float* xs = x.data();
  const std::int64_t size = size_of(x);
  const nb::gil_scoped_release release;
  const auto kernel = optim_kernels().scale;
  parallel_ranges(size, kGrain, [=](std::int64_t begin, std::int64_t end) { kernel(xs + begin, factor, end - begin); });
}

void adamw(Floats1 weight, Floats1 mean, Floats1 square, ConstFloats1 grad, float decay, float one_minus_beta1,
           float beta2, float one_minus_beta2, float root_bias, float eps, float step) {
  check_sizes({weight.shape(0), mean.shape(0), square.shape(0), grad.shape(0)});
  float *ws = weight.data(), *ms = mean.data(), *vs = square.data();
  const float* gs = grad.data();
  const std::int64_t size = size_of(weight);
  const AdamWScalars scalars{decay, one_minus_beta1, beta2, one_minus_beta2, root_bias, eps, step};
  const nb::gil_scoped_release release;
  const auto kernel = optim_kernels().adamw;
  parallel_ranges(size, kGrain, [=](std::int64_t begin, std::int64_t end) {
    kernel(ws + begin, ms + begin, vs + begin, gs + begin, scalars, end - begin);
  });
}

void momentum(Floats1 mean, ConstFloats1 grad, Floats1 ahead, float one_minus_momentum, float momentum) {
  check_sizes({mean.shape(0), grad.shape(0), ahead.shape(0)});
  float *ms = mean.data(), *as = ahead.data();
  const float* gs = grad.data();
  const std::int64_t size = size_of(mean);
  const nb::gil_scoped_release release;
  const auto kernel = optim_kernels().momentum;
  parallel_ranges(size, kGrain, [=](std::int64_t begin, std::int64_t end) {
    kernel(ms + begin, gs + begin, as + begin, one_minus_momentum, momentum, end - begin);
  });
}

void combine(ConstFloats1 x, ConstFloats1 y, Floats1 out, float a, float b) {
  check_sizes({x.shape(0), y.shape(0), out.shape(0)});
  const float *xs = x.data(), *ys = y.data();
  float* outs = out.data();
  const std::int64_t size = size_of(out);
  const nb::gil_scoped_release release;
  const auto kernel = optim_kernels().combine;
  parallel_ranges(size, kGrain, [=](std::int64_t begin, std::int64_t end) {
    kernel(xs + begin, ys + begin, outs + begin, a, b, end - begin);
  });
}

}  // namespace

void bind_optim(nb::module_& m) {
  m.def("norm", &norm, nb::arg("arrays"),
        "The L2 norm of float32 arrays [n] together: squares of each in 16 lanes, then arrays in their order.");
  m.def("scale", &scale, nb::arg("x"), nb::arg("factor"), "float32 x [n] times a number, in place.");
  m.def("adamw", &adamw, nb::arg("weight"), nb::arg("mean"), nb::arg("square"), nb::arg("grad"), nb::arg("decay"),
        nb::arg("one_minus_beta1"), nb::arg("beta2"), nb::arg("one_minus_beta2"), nb::arg("root_bias"), nb::arg("eps"),
        nb::arg("step"), "One update of float32 weight, mean and square [n], in place (optim_kernels.h).");
  m.def("momentum", &momentum, nb::arg("mean"), nb::arg("grad"), nb::arg("ahead"), nb::arg("one_minus_momentum"),
        nb::arg("momentum"), "mean [n] moves towards grad [n], in place; ahead [n] is the Nesterov gradient.");
  m.def("combine", &combine, nb::arg("x"), nb::arg("y"), nb::arg("out"), nb::arg("a"), nb::arg("b"),
        "a x + b y to out, each float32 [n]; out may be x or y.");
}

}  // namespace openbook
