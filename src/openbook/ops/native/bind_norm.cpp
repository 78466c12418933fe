#include "bindings.h"
#include "norm_kernels.h"
#include "thread_pool.h"

namespace openbook {
namespace {

void rms_norm_forward(ConstFloats2 x, ConstFloats1 weight, Floats2 out, Floats1 scales, float eps) {
  const std::int64_t rows = static_cast<std::int64_t>(x.shape(0)), size = static_cast<std::int64_t>(x.shape(1));
  if (weight.shape(0) != x.shape(1) || out.shape(0) != x.shape(0) || out.shape(1) != x.shape(1) ||
      scales.shape(0) != x.shape(0)) {
    throw nb::value_error("rms_norm_forward: shapes differ: expected x [M, D], weight [D], out [M, D], scales [M]");
  }
  const float *xs = x.data(), *ws = weight.data();
  float *outs = out.data(), *ss = scales.data();
  const nb::gil_scoped_release release;
  const auto kernel = norm_kernels().rms_norm_forward;
  parallel_ranges(rows, 16, [=](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      ss[row] = kernel(xs + row * size, ws, outs + row * size, size, eps);
    }
  });
}

}  // namespace

void bind_norm(nb::module_& m) {
  m.def("rms_norm_forward", &rms_norm_forward, nb::arg("x"), nb::arg("weight"), nb::arg("out"), nb::arg("scales"),
        nb::arg("eps"), "float32 x [M, D], weight [D] to out [M, D]; scales [M] gets 1 / sqrt(mean(x^2) + eps).");
}

}  // namespace openbook
