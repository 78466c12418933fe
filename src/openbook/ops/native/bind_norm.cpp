#include "bindings.h"
#include "norm_kernels.h"
#include "thread_pool.h"

namespace openbook {
namespace {

// Rows whose elements follow each other, and the rows of a slice need not: [R, N, D].
using StridedRows = nb::ndarray<const float, nb::ndim<3>, nb::device::cpu>;
// Floats that a task should have at least.
constexpr std::int64_t kGrain = 8192;

std::int64_t row_grain(std::int64_t size) { return kGrain / (size > 0 ? size : 1) + 1; }
// Columns of a task that adds up rows: many where there are many, as a cache line is read at least.
std::int64_t column_block(std::int64_t size) { return size >= 64 * num_threads() ? 64 : 16; }

Rows rows_of(const StridedRows& x) {
  if (x.stride(2) != 1 && x.shape(2) > 1) throw nb::value_error("x: expected the last axis of [R, N, D] to be contiguous");
  return {x.data(), static_cast<std::int64_t>(x.shape(1)), x.stride(1), x.stride(0)};
}

void rms_norm_forward(StridedRows x, ConstFloats1 weight, Floats2 out, Floats1 scales, float eps) {
  const Rows xs = rows_of(x);
  const std::int64_t rows = static_cast<std::int64_t>(x.shape(0) * x.shape(1));
  const std::int64_t size = static_cast<std::int64_t>(x.shape(2));
  if (weight.shape(0) != x.shape(2) || out.shape(0) != x.shape(0) * x.shape(1) || out.shape(1) != x.shape(2) ||
      scales.shape(0) != out.shape(0)) {
    throw nb::value_error("rms_norm_forward: expected x [R, N, D], weight [D], out [R N, D], scales [R N]");
  }
  const float* ws = weight.data();
  float *outs = out.data(), *ss = scales.data();
  const nb::gil_scoped_release release;
  const auto kernel = norm_kernels().rms_norm_forward;
  parallel_ranges(rows, row_grain(size), [=](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) ss[row] = kernel(xs[row], ws, outs + row * size, size, eps);
  });
}

void rms_norm_backward(ConstFloats2 grad, StridedRows x, ConstFloats1 weight, ConstFloats1 scales, Floats2 dx,
                       Floats1 dweight) {
  const Rows xs = rows_of(x);
  const std::int64_t rows = static_cast<std::int64_t>(x.shape(0) * x.shape(1));
  const std::int64_t size = static_cast<std::int64_t>(x.shape(2));
  const std::size_t num_rows = x.shape(0) * x.shape(1);
  if (grad.shape(0) != num_rows || grad.shape(1) != x.shape(2) || weight.shape(0) != x.shape(2) ||
      scales.shape(0) != num_rows || dx.shape(0) != num_rows || dx.shape(1) != x.shape(2) ||
      dweight.shape(0) != x.shape(2)) {
    throw nb::value_error(
        "rms_norm_backward: expected grad [R N, D], x [R, N, D], weight [D], scales [R N], dx [R N, D], dweight [D]");
  }
  const float *gs = grad.data(), *ws = weight.data(), *ss = scales.data();
  float *dxs = dx.data(), *dws = dweight.data();
  const nb::gil_scoped_release release;
  const NormKernels& kernels = norm_kernels();
  parallel_ranges(rows, row_grain(size), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      kernels.rms_norm_dx(gs + row * size, xs[row], ws, ss[row], dxs + row * size, size);
    }
  });
  const std::int64_t block = column_block(size);
  parallel_for((size + block - 1) / block, [&](std::int64_t task) {
    const std::int64_t begin = task * block, end = begin + block < size ? begin + block : size;
    kernels.rms_norm_dweight(gs, xs, ss, dws, rows, size, begin, end);
  });
}

// An array that may be left out: empty.
float* or_null(const Floats1& a) { return a.shape(0) == 0 ? nullptr : a.data(); }

void layer_norm_forward(ConstFloats2 x, ConstFloats1 weight, ConstFloats1 bias, Floats2 out, Floats1 means,
                        Floats1 scales, float eps) {
  const std::int64_t rows = static_cast<std::int64_t>(x.shape(0)), size = static_cast<std::int64_t>(x.shape(1));
  if (weight.shape(0) != x.shape(1) || (bias.shape(0) != x.shape(1) && bias.shape(0) != 0) ||
      out.shape(0) != x.shape(0) || out.shape(1) != x.shape(1) || means.shape(0) != x.shape(0) ||
      scales.shape(0) != x.shape(0)) {
    throw nb::value_error(
        "layer_norm_forward: expected x [M, D], weight [D], bias [D] or [0], out [M, D], means [M], scales [M]");
  }
  const float *xs = x.data(), *ws = weight.data(), *bs = bias.shape(0) == 0 ? nullptr : bias.data();
  float *outs = out.data(), *ms = means.data(), *ss = scales.data();
  const nb::gil_scoped_release release;
  const auto kernel = norm_kernels().layer_norm_forward;
  parallel_ranges(rows, row_grain(size), [=](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      kernel(xs + row * size, ws, bs, outs + row * size, ms + row, ss + row, size, eps);
    }
  });
}

void layer_norm_backward(ConstFloats2 grad, ConstFloats2 x, ConstFloats1 weight, ConstFloats1 means,
                         ConstFloats1 scales, Floats2 dx, Floats1 dweight, Floats1 dbias) {
  const std::int64_t rows = static_cast<std::int64_t>(x.shape(0)), size = static_cast<std::int64_t>(x.shape(1));
  if (grad.shape(0) != x.shape(0) || grad.shape(1) != x.shape(1) || weight.shape(0) != x.shape(1) ||
      means.shape(0) != x.shape(0) || scales.shape(0) != x.shape(0) || dx.shape(0) != x.shape(0) ||
      dx.shape(1) != x.shape(1) || dweight.shape(0) != x.shape(1) ||
      (dbias.shape(0) != x.shape(1) && dbias.shape(0) != 0)) {
    throw nb::value_error(
        "layer_norm_backward: expected grad, x and dx [M, D], means and scales [M], weight and dweight [D], dbias [D] "
        "or [0]");
  }
  const float *gs = grad.data(), *xs = x.data(), *ws = weight.data(), *ms = means.data(), *ss = scales.data();
  float *dxs = dx.data(), *dws = dweight.data(), *dbs = or_null(dbias);
  const nb::gil_scoped_release release;
  const NormKernels& kernels = norm_kernels();
  parallel_ranges(rows, row_grain(size), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      const std::int64_t at = row * size;
      kernels.layer_norm_dx(gs + at, xs + at, ws, ms[row], ss[row], dxs + at, size);
    }
  });
  const std::int64_t block = column_block(size);
  parallel_for((size + block - 1) / block, [&](std::int64_t task) {
    const std::int64_t begin = task * block, end = begin + block < size ? begin + block : size;
    kernels.layer_norm_dweight(gs, xs, ms, ss, dws, dbs, rows, size, begin, end);
  });
}

}  // namespace

void bind_norm(nb::module_& m) {
  m.def("rms_norm_forward", &rms_norm_forward, nb::arg("x"), nb::arg("weight"), nb::arg("out"), nb::arg("scales"),
        nb::arg("eps"),
        "float32 x [R, N, D], of any strides but the last, weight [D] to out [R N, D]; scales [R N] gets "
        "1 / sqrt(mean(x^2) + eps).");
  m.def("rms_norm_backward", &rms_norm_backward, nb::arg("grad"), nb::arg("x"), nb::arg("weight"), nb::arg("scales"),
        nb::arg("dx"), nb::arg("dweight"), "grad [R N, D] to dx [R N, D] and dweight [D]; the rest as in the forward.");
  m.def("layer_norm_forward", &layer_norm_forward, nb::arg("x"), nb::arg("weight"), nb::arg("bias"), nb::arg("out"),
        nb::arg("means"), nb::arg("scales"), nb::arg("eps"),
        "float32 x [M, D], weight [D], bias [D] or empty to out [M, D], means [M] and scales [M].");
  m.def("layer_norm_backward", &layer_norm_backward, nb::arg("grad"), nb::arg("x"), nb::arg("weight"),
        nb::arg("means"), nb::arg("scales"), nb::arg("dx"), nb::arg("dweight"), nb::arg("dbias"),
        "grad [M, D] to dx [M, D], dweight [D] and dbias [D], which may be empty.");
}

}  // namespace openbook
