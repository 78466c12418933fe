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

using ConstStrided = nb::ndarray<const float, nb::device::cpu>;
using MutableStrided = nb::ndarray<float, nb::device::cpu>;
using ConstIds = Array<const std::int64_t, 1>;

// Sizes and strides of arrays of any rank are read through this: nanobind's are unsigned.
template <typename T>
std::int64_t size(const T& array, int axis) {
  return static_cast<std::int64_t>(array.shape(static_cast<std::size_t>(axis)));
}

// An array of matrices, or of one.
struct Batch {
  std::int64_t count, rows, columns, step, row_stride, column_stride;
};

template <typename T>
Batch batch_of(const T& array) {
  if (array.ndim() != 2 && array.ndim() != 3) throw nb::value_error("gemm: expected arrays of 2 or 3 axes");
  const int i = array.ndim() == 2 ? 0 : 1;
  return {i == 0 ? 1 : size(array, 0), size(array, i), size(array, i + 1), i == 0 ? 0 : array.stride(0), array.stride(i),
          array.stride(i + 1)};
}

void gemm_batch(const ConstStrided& a, const ConstStrided& b, const MutableStrided& out,
                const std::optional<ConstFloats1>& bias, bool accumulate) {
  const Batch left = batch_of(a), right = batch_of(b), to = batch_of(out);
  const std::int64_t m = to.rows, n = to.columns, k = left.columns;
  if (left.count != to.count || right.count != to.count || left.rows != m || right.rows != k || right.columns != n ||
      (bias && size(*bias, 0) != n) || (n > 1 && to.column_stride != 1)) {
    throw nb::value_error(
        "gemm: shapes differ: expected a [B, M, K], b [B, K, N], out [B, M, N] with contiguous rows (or one of each, "
        "without B), bias [N] or None");
  }
  const float *as = a.data(), *bs = b.data();
  const float* biases = bias ? bias->data() : nullptr;
  float* outs = out.data();
  const nb::gil_scoped_release release;
  const auto one = [=](auto&& product, std::int64_t i) {
    product(m, n, k, Strided{as + i * left.step, left.row_stride, left.column_stride},
            Strided{bs + i * right.step, right.row_stride, right.column_stride}, outs + i * to.step, to.row_stride,
            accumulate, biases);
  };
  // Many small products: each on one thread.
  if (to.count >= 4 * num_threads()) {
    parallel_for(to.count, [&](std::int64_t i) { one(gemm_serial, i); });
  } else {
    for (std::int64_t i = 0; i < to.count; ++i) one(gemm, i);
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
        "float32 a [B, M, K], b [B, K, N] of any strides to out [B, M, N], or one of each: fma over k ascending from 0, or "
        "from `out` if `accumulate`, then plus bias [N].");
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
