#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <cstring>
#include <memory>
#include <optional>
#include <string>

#include "bindings.h"
#include "quant.h"
#include "thread_pool.h"

namespace openbook {
namespace {

using Bytes1 = Array<const std::uint8_t, 1>;
using Bytes2 = Array<const std::uint8_t, 2>;
using OptionalFloats1 = std::optional<ConstFloats1>;

constexpr const char* kKinds[] = {"Q8_0", "Q4_0", "Q4_1"};

QuantKind find_kind(const std::string& name) {
  for (int index = 0; index < 3; ++index) {
    if (name == kKinds[index]) return static_cast<QuantKind>(index);
  }
  throw nb::value_error("the kind of a quantised matrix is none of Q8_0, Q4_0, Q4_1");
}

void make(QuantWeight* self, const std::string& kind, std::int64_t num_rows, std::int64_t num_columns) {
  new (self) QuantWeight(find_kind(kind), num_rows, num_columns);
}

QuantWeight from_bytes(const std::string& kind, std::int64_t num_rows, std::int64_t num_columns, nb::object data) {
  const Bytes1 bytes = nb::cast<Bytes1>(data);
  // The last user may let go on a thread without the GIL.
  const std::shared_ptr<const void> owner(new nb::object(data), [](const nb::object* held) {
    const nb::gil_scoped_acquire acquire;
    delete held;
  });
  QuantWeight weight(find_kind(kind), num_rows, num_columns, bytes.data(), owner);
  if (static_cast<std::int64_t>(bytes.shape(0)) != weight.view().num_bytes()) {
    throw nb::value_error("the bytes of a packed matrix are not as many as its shape takes");
  }
  return weight;
}

void set_rows(QuantWeight& self, std::int64_t first, Bytes2 raw) {
  const QuantView& view = self.view();
  if (static_cast<std::int64_t>(raw.shape(1)) != view.num_blocks() * raw_block_bytes(view.kind)) {
    throw nb::value_error("rows of a quantised matrix have other bytes than its columns take");
  }
  const std::int64_t num_rows = static_cast<std::int64_t>(raw.shape(0));
  const std::uint8_t* data = raw.data();
  const nb::gil_scoped_release release;
  self.set_rows(first, num_rows, data);
}

void linear(ConstFloats2 x, const QuantWeight& weight, OptionalFloats1 bias, Floats2 out) {
  const QuantView& view = weight.view();
  const std::int64_t rows = static_cast<std::int64_t>(x.shape(0));
  if (static_cast<std::int64_t>(x.shape(1)) != view.num_columns || out.shape(0) != x.shape(0) ||
      static_cast<std::int64_t>(out.shape(1)) != view.num_rows ||
      (bias && static_cast<std::int64_t>(bias->shape(0)) != view.num_rows)) {
    throw nb::value_error("quant_linear: shapes differ: expected x [M, K], weight [N, K], bias [N], out [M, N]");
  }
  const float *xs = x.data(), *bs = bias ? bias->data() : nullptr;
  float* outs = out.data();
  const nb::gil_scoped_release release;
  thread_local QuantizedRows quantized;
  quantized.quantize(xs, view.num_columns, rows, view.num_columns);
  quant_linear(view, quantized, bs, outs, view.num_rows);
}

void rows(const QuantWeight& weight, Array<const std::int64_t, 1> ids, Floats2 out) {
  const QuantView& view = weight.view();
  const std::int64_t count = static_cast<std::int64_t>(ids.shape(0));
  if (out.shape(0) != ids.shape(0) || static_cast<std::int64_t>(out.shape(1)) != view.num_columns) {
    throw nb::value_error("quant_rows: shapes differ: expected ids [M], out [M, K]");
  }
  const std::int64_t* all = ids.data();
  float* outs = out.data();
  for (std::int64_t index = 0; index < count; ++index) {
    if (all[index] < 0 || all[index] >= view.num_rows) throw nb::index_error("quant_rows: no such row");
  }
  const nb::gil_scoped_release release;
  parallel_ranges(count, 8, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t index = begin; index < end; ++index) {
      dequantize_row(view, all[index], outs + index * view.num_columns);
    }
  });
}

void quantize(ConstFloats2 x, Array<std::int8_t, 2> codes, Floats2 scales, Floats2 sums) {
  const std::int64_t num_rows = static_cast<std::int64_t>(x.shape(0)), size = static_cast<std::int64_t>(x.shape(1));
  const std::int64_t num_blocks = size / kQuantBlock;
  if (codes.shape(0) != x.shape(0) || codes.shape(1) != x.shape(1) || scales.shape(0) != x.shape(0) ||
      sums.shape(0) != x.shape(0) || static_cast<std::int64_t>(scales.shape(1)) != num_blocks ||
      static_cast<std::int64_t>(sums.shape(1)) != num_blocks) {
    throw nb::value_error("quantize_rows: shapes differ: expected x, codes [M, K], scales, sums [M, K / 32]");
  }
  QuantizedRows quantized;
  quantized.quantize(x.data(), size, num_rows, size);
  for (std::int64_t index = 0; index < num_rows * num_blocks; ++index) {
    const QuantBlock& block = quantized.row(0)[index];
    std::memcpy(codes.data() + index * kQuantBlock, block.codes, kQuantBlock);
    scales.data()[index] = block.scale;
    sums.data()[index] = block.sum;
  }
}

nb::object packed_bytes(nb::handle self) {
  const QuantView& view = nb::cast<const QuantWeight&>(self).view();
  return nb::cast(nb::ndarray<nb::numpy, const std::uint8_t, nb::ndim<1>>(
      view.data, {static_cast<std::size_t>(view.num_bytes())}, self));
}

}  // namespace

void bind_quant(nb::module_& m) {
  m.attr("QUANT_LAYOUT") = kQuantLayout;
  nb::class_<QuantWeight>(m, "QuantWeight", "A packed matrix of GGUF's Q8_0, Q4_0 or Q4_1.")
      .def("__init__", &make, nb::arg("kind"), nb::arg("num_rows"), nb::arg("num_columns"))
      .def_static("from_bytes", &from_bytes, nb::arg("kind"), nb::arg("num_rows"), nb::arg("num_columns"),
                  nb::arg("data"), "What `packed` of such a matrix gave, uint8 [bytes], 64-byte aligned; not copied.")
      .def("set_rows", &set_rows, nb::arg("first"), nb::arg("raw"),
           "Rows from number `first` on, as GGUF stores them: uint8 [rows, bytes of a row].")
      .def("packed", &packed_bytes, "The packed bytes, uint8 [bytes], not copied.")
      .def_prop_ro("kind", [](const QuantWeight& self) { return kKinds[static_cast<int>(self.view().kind)]; })
      .def_prop_ro("num_rows", [](const QuantWeight& self) { return self.view().num_rows; })
      .def_prop_ro("num_columns", [](const QuantWeight& self) { return self.view().num_columns; });
  m.def("quant_linear", &linear, nb::arg("x"), nb::arg("weight"), nb::arg("bias").none(), nb::arg("out"),
        "float32 x [M, K], quantised, by weight [N, K], plus bias [N] or None, to out [M, N].");
  m.def("quant_rows", &rows, nb::arg("weight"), nb::arg("ids"), nb::arg("out"),
        "Rows of weight [N, K] at ids int64 [M] as float32 to out [M, K].");
  m.def("quantize_rows", &quantize, nb::arg("x"), nb::arg("codes"), nb::arg("scales"), nb::arg("sums"),
        "float32 x [M, K] to codes int8 [M, K]; scales and scaled sums float32 [M, K / 32].");
}

}  // namespace openbook
