#include <cstring>

#include "bindings.h"
#include "softmax_kernels.h"
#include "thread_pool.h"

namespace openbook {
namespace {

using ConstInts1 = Array<const std::int64_t, 1>;
// Floats that a task should have at least.
constexpr std::int64_t kGrain = 2048;

void softmax_forward(ConstFloats2 x, Floats2 out) {
  if (x.shape(0) != out.shape(0) || x.shape(1) != out.shape(1)) {
    throw nb::value_error("softmax_forward: expected x [M, V] and out [M, V]");
  }
  const float* xs = x.data();
  float* outs = out.data();
  const std::int64_t rows = static_cast<std::int64_t>(x.shape(0)), size = static_cast<std::int64_t>(x.shape(1));
  const nb::gil_scoped_release release;
  const auto kernel = softmax_kernels().softmax;
  parallel_ranges(rows, kGrain / (size + 1) + 1, [=](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) kernel(xs + row * size, outs + row * size, size);
  });
}

void softmax_backward(ConstFloats2 grad, ConstFloats2 y, Floats2 dx) {
  if (grad.shape(0) != y.shape(0) || grad.shape(1) != y.shape(1) || dx.shape(0) != y.shape(0) ||
      dx.shape(1) != y.shape(1)) {
    throw nb::value_error("softmax_backward: expected grad, y and dx [M, V]");
  }
  const float *gs = grad.data(), *ys = y.data();
  float* dxs = dx.data();
  const std::int64_t rows = static_cast<std::int64_t>(y.shape(0)), size = static_cast<std::int64_t>(y.shape(1));
  const nb::gil_scoped_release release;
  const auto kernel = softmax_kernels().softmax_backward;
  parallel_ranges(rows, kGrain / (size + 1) + 1, [=](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) kernel(gs + row * size, ys + row * size, dxs + row * size, size);
  });
}

void cross_entropy(ConstFloats2 logits, ConstInts1 targets, Floats1 losses, Floats2 dlogits) {
  const std::int64_t rows = static_cast<std::int64_t>(logits.shape(0)), size = static_cast<std::int64_t>(logits.shape(1));
  const bool has_gradient = dlogits.shape(0) != 0;
  if (targets.shape(0) != logits.shape(0) || losses.shape(0) != logits.shape(0) ||
      (has_gradient && (dlogits.shape(0) != logits.shape(0) || dlogits.shape(1) != logits.shape(1)))) {
    throw nb::value_error("cross_entropy: expected logits and dlogits [M, V], targets and losses [M]");
  }
  const std::int64_t* ts = targets.data();
  for (std::int64_t row = 0; row < rows; ++row) {
    if (ts[row] >= size) throw nb::index_error("cross_entropy: a target is past the last logit");
  }
  const float* xs = logits.data();
  float *ls = losses.data(), *dxs = has_gradient ? dlogits.data() : nullptr;
  const nb::gil_scoped_release release;
  const auto kernel = softmax_kernels().cross_entropy;
  parallel_ranges(rows, kGrain / (size + 1) + 1, [=](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      float* dx = has_gradient ? dxs + row * size : nullptr;
      if (ts[row] >= 0) {
        ls[row] = kernel(xs + row * size, ts[row], dx, size);
      } else {
        ls[row] = 0.0f;
        if (has_gradient) std::memset(dx, 0, sizeof(float) * static_cast<std::size_t>(size));
      }
    }
  });
}

float sum(ConstFloats1 x) {
  const FloatMode mode;
  return softmax_kernels().sum(x.data(), static_cast<std::int64_t>(x.shape(0)));
}

}  // namespace

void bind_softmax(nb::module_& m) {
  m.def("softmax_forward", &softmax_forward, nb::arg("x"), nb::arg("out"), "float32 x [M, V] to out [M, V].");
  m.def("softmax_backward", &softmax_backward, nb::arg("grad"), nb::arg("y"), nb::arg("dx"),
        "grad and the softmax y [M, V] to dx [M, V].");
  m.def("cross_entropy", &cross_entropy, nb::arg("logits"), nb::arg("targets"), nb::arg("losses"), nb::arg("dlogits"),
        "losses [M] of logits [M, V] at int64 targets [M], 0 where a target is negative; dlogits [M, V] gets their "
        "gradient: it may be the logits themselves, or empty.");
  m.def("sum", &sum, nb::arg("x"), "float32 x [n], added up in 16 lanes.");
}

}  // namespace openbook
