#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <cstring>
#include <optional>
#include <string>

#include "bindings.h"
#include "gemm.h"
#include "packed_weight_array.h"
#include "row_kernels.h"
#include "thread_pool.h"

namespace openbook {
namespace {

template <int Rank>
using ConstStrided = nb::ndarray<const float, nb::ndim<Rank>, nb::device::cpu>;
template <int Rank>
using MutableStrided = nb::ndarray<float, nb::ndim<Rank>, nb::device::cpu>;
using ConstIds = Array<const std::int64_t, 1>;

// Sizes and strides of arrays of any rank are read through this: nanobind's are unsigned.
template <typename T>
std::int64_t size(const T& array, int axis) {
  return static_cast<std::int64_t>(array.shape(static_cast<std::size_t>(axis)));
}

void gemm_batch(ConstStrided<3> a, ConstStrided<3> b, MutableStrided<3> out, const std::optional<ConstFloats1>& bias,
                bool accumulate) {
  const std::int64_t batch = size(out, 0), m = size(out, 1), n = size(out, 2), k = size(a, 2);
  if (size(a, 0) != batch || size(b, 0) != batch || size(a, 1) != m || size(b, 1) != k || size(b, 2) != n ||
      (bias && size(*bias, 0) != n) || (n > 1 && out.stride(2) != 1)) {
    throw nb::value_error(
        "gemm: shapes differ: expected a [B, M, K], b [B, K, N], out [B, M, N] with contiguous rows, bias [N] or None");
  }
  const Strided as{a.data(), a.stride(1), a.stride(2)}, bs{b.data(), b.stride(1), b.stride(2)};
  const std::int64_t a_step = a.stride(0), b_step = b.stride(0), out_step = out.stride(0), out_stride = out.stride(1);
  const float* biases = bias ? bias->data() : nullptr;
  float* outs = out.data();
  const nb::gil_scoped_release release;
  const auto one = [=](auto&& product, std::int64_t i) {
    product(m, n, k, Strided{as.data + i * a_step, as.row_stride, as.column_stride},
            Strided{bs.data + i * b_step, bs.row_stride, bs.column_stride}, outs + i * out_step, out_stride, accumulate,
            biases);
  };
  // Many small products: each on one thread.
  if (batch >= 4 * num_threads()) {
    parallel_for(batch, [&](std::int64_t i) { one(gemm_serial, i); });
  } else {
    for (std::int64_t i = 0; i < batch; ++i) one(gemm, i);
  }
}

void packed_linear_arrays(ConstFloats2 x, const PackedWeightArray& packed, const std::optional<ConstFloats1>& bias,
                          Floats2 out) {
  const PackedWeight& weight = packed.weight();
  const std::int64_t m = size(x, 0);
  if (size(x, 1) != weight.k || size(out, 0) != m || size(out, 1) != weight.n || (bias && size(*bias, 0) != weight.n)) {
    throw nb::value_error("packed_linear: shapes differ: expected x [M, K], weight [N, K], bias [N] or None, out [M, N]");
  }
  const float *xs = x.data(), *biases = bias ? bias->data() : nullptr;
  float* outs = out.data();
  const nb::gil_scoped_release release;
  packed_linear(weight, xs, weight.k, m, biases, outs, weight.n);
}

void sum_rows(ConstFloats2 x, Floats1 out) {
  const std::int64_t rows = size(x, 0), columns = size(x, 1);
  if (size(out, 0) != columns) throw nb::value_error("sum_rows: shapes differ: expected x [M, N], out [N]");
  const float* xs = x.data();
  float* outs = out.data();
  const nb::gil_scoped_release release;
  const auto kernel = row_kernels().sum_rows;
  parallel_ranges((columns + 15) / 16, 1, [=](std::int64_t begin, std::int64_t end) {
    const std::int64_t first = begin * 16, last = end * 16 < columns ? end * 16 : columns;
    kernel(xs + first, rows, last - first, columns, outs + first);
  });
}

bool all_below(const std::int64_t* ids, std::int64_t count, std::int64_t limit) {
  for (std::int64_t i = 0; i < count; ++i) {
    if (ids[i] < 0 || ids[i] >= limit) return false;
  }
  return true;
}

void take_rows(ConstFloats2 weight, ConstIds ids, Floats2 out) {
  const std::int64_t rows = size(ids, 0), columns = size(weight, 1), limit = size(weight, 0);
  if (size(out, 0) != rows || size(out, 1) != columns || !all_below(ids.data(), rows, limit)) {
    throw nb::value_error("take_rows: expected weight [V, D], ids [M] from 0 to V - 1, out [M, D]");
  }
  const float* ws = weight.data();
  const std::int64_t* at = ids.data();
  float* outs = out.data();
  const nb::gil_scoped_release release;
  parallel_ranges(rows, 1 + 16384 / (columns + 1), [=](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      std::memcpy(outs + row * columns, ws + at[row] * columns, static_cast<std::size_t>(columns) * sizeof(float));
    }
  });
}

void add_rows_at(ConstFloats2 x, ConstIds ids, Floats2 out) {
  const std::int64_t rows = size(ids, 0), columns = size(x, 1), limit = size(out, 0);
  if (size(x, 0) != rows || size(out, 1) != columns || !all_below(ids.data(), rows, limit)) {
    throw nb::value_error("add_rows_at: expected x [M, D], ids [M] from 0 to V - 1, out [V, D]");
  }
  const float* xs = x.data();
  const std::int64_t* at = ids.data();
  float* outs = out.data();
  const nb::gil_scoped_release release;
  const auto kernel = row_kernels().add_rows_at;
  // Threads split the features: each adds the rows of all tokens in their order.
  parallel_ranges((columns + 15) / 16, 1 + 1024 / (rows + 1), [=](std::int64_t begin, std::int64_t end) {
    const std::int64_t first = begin * 16, last = end * 16 < columns ? end * 16 : columns;
    kernel(xs + first, at, rows, last - first, columns, outs + first, columns);
  });
}

}  // namespace

void bind_gemm(nb::module_& m) {
  m.def("gemm", &gemm_batch, nb::arg("a"), nb::arg("b"), nb::arg("out"), nb::arg("bias") = nb::none(),
        nb::arg("accumulate") = false,
        "float32 a [B, M, K], b [B, K, N] of any strides to out [B, M, N]: fma over k ascending from 0, or from `out` if "
        "`accumulate`, then plus bias [N].");
  nb::class_<PackedWeightArray>(m, "PackedWeight", "A matrix [n, k] in the order in which a product reads it.")
      .def(nb::init<const ConstBytes&, std::int64_t, std::int64_t, const std::string&, bool>(), nb::arg("weight"),
           nb::arg("n"), nb::arg("k"), nb::arg("element"), nb::arg("is_packed") = false,
           "From the bytes of a row-major matrix; or, if `is_packed`, from those of `data`, which are then not copied.")
      .def_prop_ro("n", [](const PackedWeightArray& w) { return w.weight().n; })
      .def_prop_ro("k", [](const PackedWeightArray& w) { return w.weight().k; })
      .def_prop_ro("element", [](const PackedWeightArray& w) { return std::string(element_name(w.weight().element)); })
      .def_prop_ro(
          "data",
          [](const PackedWeightArray& w) {
            return nb::ndarray<nb::numpy, const std::uint8_t, nb::ndim<1>>(w.weight().data, {w.num_bytes()}, nb::find(w));
          },
          "The packed bytes, uint8.");
  m.def("packed_linear", &packed_linear_arrays, nb::arg("x"), nb::arg("weight"), nb::arg("bias").none(), nb::arg("out"),
        "float32 x [M, K] times weight [N, K] transposed, plus bias [N], to out [M, N]: the same bits as `gemm`.");
  m.def("sum_rows", &sum_rows, nb::arg("x"), nb::arg("out"), "float32 x [M, N] to out [N]: rows added in their order.");
  m.def("take_rows", &take_rows, nb::arg("weight"), nb::arg("ids"), nb::arg("out"),
        "Rows of float32 weight [V, D] at int64 ids [M] to out [M, D].");
  m.def("add_rows_at", &add_rows_at, nb::arg("x"), nb::arg("ids"), nb::arg("out"),
        "Adds row i of float32 x [M, D] to row ids[i] of out [V, D], i ascending.");
}

}  // namespace openbook
