#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "bindings.h"
#include "decoder.h"
#include "packed_weight_array.h"

namespace openbook {
namespace {

using Ints = Array<const std::int32_t, 1>;

std::int64_t extent(std::size_t size) { return static_cast<std::int64_t>(size); }

void require(bool is_right, const char* message) {
  if (!is_right) throw nb::value_error(message);
}

void require_indices(const Ints& indices, std::int64_t limit, const std::string& what) {
  for (std::size_t i = 0; i < indices.shape(0); ++i) {
    const std::int32_t index = indices.data()[i];
    if (index < 0 || index >= limit) {
      throw nb::index_error(
          (what + " " + std::to_string(index) + " is not from 0 to " + std::to_string(limit - 1)).c_str());
    }
  }
}

using Tables = Array<const std::int32_t, 2>;
using Adapters = std::optional<Ints>;

struct Cache {
  std::uint8_t* pages;
  float *keys, *values;
  std::int64_t num_blocks;
};

void run(Decoder& decoder, const Ints& token_ids, const Ints& positions, const Ints& sequences,
         const Tables& block_tables, const Cache& cache, const ConstFloats2& cosines, const ConstFloats2& sines,
         const Ints& wanted, const Floats2& out, const Adapters& adapters, bool is_hidden) {
  const DecoderShape& s = decoder.shape();
  const std::int64_t M = extent(token_ids.shape(0)), num_blocks = cache.num_blocks;
  const std::int64_t table_width = extent(block_tables.shape(1));
  require(M > 0 && extent(positions.shape(0)) == M && extent(sequences.shape(0)) == M,
          "step: expected token_ids, positions and sequences of the same length M, from 1");
  const std::int64_t out_size = is_hidden ? s.hidden_size : s.vocab_size;
  require(extent(out.shape(0)) == extent(wanted.shape(0)) && extent(out.shape(1)) == out_size,
          is_hidden ? "step: expected out [R, hidden_size] for R wanted rows"
                    : "step: expected out [R, vocab_size] for R wanted rows");
  require_indices(token_ids, s.vocab_size, "the token id");
  require_indices(sequences, extent(block_tables.shape(0)), "the sequence");
  require_indices(wanted, M, "the wanted row");
  std::int64_t num_positions = table_width * kPageTokens;
  if (s.num_positions != 0) {
    num_positions = std::min(num_positions, s.num_positions);
  } else {
    require(extent(cosines.shape(1)) == s.head_dim / 2 && cosines.shape(0) == sines.shape(0) &&
                extent(sines.shape(1)) == s.head_dim / 2,
            "step: expected cosines and sines [positions, head_dim / 2]");
    num_positions = std::min(num_positions, extent(cosines.shape(0)));
  }
  require_indices(positions, num_positions, "the position");
  for (std::int64_t i = 0; i < M; ++i) {
    const std::int64_t pages = positions.data()[i] / kPageTokens + 1;
    const std::int32_t* table = block_tables.data() + sequences.data()[i] * table_width;
    for (std::int64_t page = 0; page < pages; ++page) {
      require(table[page] >= 0 && table[page] < num_blocks, "step: a block table names a block that is not there");
    }
  }
  const std::vector<std::string> missing = decoder.missing();
  if (!missing.empty()) throw nb::value_error(("step: the decoder has no weight " + missing.front()).c_str());
  for (std::size_t i = 1; i < wanted.shape(0); ++i) {
    require(wanted.data()[i - 1] < wanted.data()[i], "step: expected wanted rows in ascending order");
  }
  if (adapters) {
    require(adapters->shape(0) == block_tables.shape(0), "step: expected adapters [S], one for each sequence");
    for (std::size_t i = 0; i < adapters->shape(0); ++i) {
      const std::int32_t adapter = adapters->data()[i];
      if (adapter != -1 && !decoder.has_adapter(adapter)) {
        throw nb::index_error(("the adapter " + std::to_string(adapter) + " is not there").c_str());
      }
    }
  }
  const DecoderStep arguments = {M,
                                 token_ids.data(),
                                 positions.data(),
                                 sequences.data(),
                                 block_tables.data(),
                                 table_width,
                                 cache.pages,
                                 cache.keys,
                                 cache.values,
                                 num_blocks,
                                 cosines.data(),
                                 sines.data(),
                                 extent(wanted.shape(0)),
                                 wanted.data(),
                                 is_hidden ? nullptr : out.data(),
                                 is_hidden ? out.data() : nullptr,
                                 adapters ? adapters->data() : nullptr};
  const nb::gil_scoped_release release;
  decoder.step(arguments);
}

void step(Decoder& decoder, Ints token_ids, Ints positions, Ints sequences, Tables block_tables, Array<float, 5> keys,
          Array<float, 5> values, ConstFloats2 cosines, ConstFloats2 sines, Ints wanted, Floats2 out, Adapters adapters,
          bool is_hidden) {
  const DecoderShape& s = decoder.shape();
  require(extent(keys.shape(0)) == s.num_layers && extent(keys.shape(2)) == s.num_kv_heads &&
              extent(keys.shape(3)) == s.head_dim && extent(keys.shape(4)) == kPageTokens,
          "step: expected keys [num_layers, num_blocks, num_kv_heads, head_dim, 16]");
  require(extent(values.shape(0)) == s.num_layers && values.shape(1) == keys.shape(1) &&
              extent(values.shape(2)) == s.num_kv_heads && extent(values.shape(3)) == kPageTokens &&
              extent(values.shape(4)) == s.head_dim,
          "step: expected values [num_layers, num_blocks, num_kv_heads, 16, head_dim]");
  const Cache cache = {nullptr, keys.data(), values.data(), extent(keys.shape(1))};
  run(decoder, token_ids, positions, sequences, block_tables, cache, cosines, sines, wanted, out, adapters, is_hidden);
}

void quant_step(Decoder& decoder, Ints token_ids, Ints positions, Ints sequences, Tables block_tables,
                Array<std::uint8_t, 4> pages, ConstFloats2 cosines, ConstFloats2 sines, Ints wanted, Floats2 out,
                Adapters adapters, bool is_hidden) {
  const DecoderShape& s = decoder.shape();
  require(s.head_dim % kQuantBlock == 0, "step: pages of 8 bits are for heads of a multiple of 32 features");
  require(extent(pages.shape(0)) == s.num_layers && extent(pages.shape(2)) == s.num_kv_heads &&
              extent(pages.shape(3)) == quant_page_bytes(s.head_dim),
          "step: expected pages [num_layers, num_blocks, num_kv_heads, quant_page_bytes(head_dim)]");
  const Cache cache = {pages.data(), nullptr, nullptr, extent(pages.shape(1))};
  run(decoder, token_ids, positions, sequences, block_tables, cache, cosines, sines, wanted, out, adapters, is_hidden);
}

}  // namespace

void bind_decoder(nb::module_& m) {
  nb::class_<Decoder>(m, "Decoder", "A whole dense decoder for inference; see decoder.h. One step at a time.")
      .def(
          "__init__",
          [](Decoder* self, std::int64_t hidden_size, std::int64_t intermediate_size, std::int64_t num_layers,
             std::int64_t num_heads, std::int64_t num_kv_heads, std::int64_t head_dim, std::int64_t vocab_size,
             std::int64_t num_positions, bool has_layer_norm, bool has_swiglu, float norm_eps, bool has_qkv_bias,
             bool has_qk_norm, bool is_tied, std::vector<float> scales, std::vector<std::int64_t> windows) {
            require(extent(scales.size()) == num_layers && extent(windows.size()) == num_layers,
                    "Decoder: expected one scale and one window for each layer");
            new (self) Decoder({hidden_size, intermediate_size, num_layers, num_heads, num_kv_heads, head_dim, vocab_size,
                                num_positions, has_layer_norm ? NormKind::layer : NormKind::rms,
                                has_swiglu ? MlpKind::swiglu : MlpKind::gelu_tanh, norm_eps, has_qkv_bias, has_qk_norm,
                                is_tied, std::move(scales), std::move(windows)});
          },
          nb::kw_only(), nb::arg("hidden_size"), nb::arg("intermediate_size"), nb::arg("num_layers"),
          nb::arg("num_heads"), nb::arg("num_kv_heads"), nb::arg("head_dim"), nb::arg("vocab_size"),
          nb::arg("num_positions"), nb::arg("has_layer_norm"), nb::arg("has_swiglu"), nb::arg("norm_eps"),
          nb::arg("has_qkv_bias"), nb::arg("has_qk_norm"), nb::arg("is_tied"), nb::arg("scales"), nb::arg("windows"))
      .def(
          "set_vector",
          [](Decoder& decoder, const std::string& name, ConstFloats1 vector) {
            decoder.set_vector(name, vector.data(), extent(vector.shape(0)));
          },
          nb::arg("name"), nb::arg("vector"), "Copies vector float32 [n]; ValueError for an unknown name or length.")
      .def(
          "set_matrix",
          [](Decoder& decoder, const std::string& name, const PackedWeightArray& matrix) {
            decoder.set_matrix(name, matrix.weight());
          },
          nb::arg("name"), nb::arg("matrix"), nb::keep_alive<1, 3>(), "ValueError for an unknown name or another shape.")
      .def(
          "set_matrix",
          [](Decoder& decoder, const std::string& name, const QuantWeight& matrix) {
            decoder.set_matrix(name, matrix.view());
          },
          nb::arg("name"), nb::arg("matrix"), nb::keep_alive<1, 3>())
      .def(
          "set_low_rank",
          [](Decoder& decoder, std::int32_t adapter, const std::string& name,
             const std::vector<std::tuple<std::int64_t, ConstFloats2, ConstFloats2>>& updates) {
            const auto matrix = [](const ConstFloats2& array) {
              return FloatMatrix{array.data(), extent(array.shape(0)), extent(array.shape(1))};
            };
            std::vector<LowRankUpdate> given;
            for (const auto& [first_row, a, b] : updates) given.push_back({first_row, matrix(a), matrix(b)});
            decoder.set_low_rank(adapter, name, given);
          },
          nb::arg("adapter"), nb::arg("name"), nb::arg("updates"),
          "What adapter number `adapter` adds to matrix `name`: a list of (first_row, a, b), rows ascending; outputs from "
          "first_row on get b (a x). Copies float32 a [rank, inputs] and b [outputs, rank]. ValueError for an unknown name, "
          "or updates that do not fit or overlap.")
      .def("remove_adapter", &Decoder::remove_adapter, nb::arg("adapter"), "Forgets all that adapter number `adapter` adds.")
      .def("has_adapter", &Decoder::has_adapter, nb::arg("adapter"), "Whether adapter number `adapter` adds anything.")
      .def("missing", &Decoder::missing, "Names of the weights that were not set yet.")
      .def("step", &step, nb::arg("token_ids"), nb::arg("positions"), nb::arg("sequences"), nb::arg("block_tables"),
           nb::arg("keys"), nb::arg("values"), nb::arg("cosines"), nb::arg("sines"), nb::arg("wanted"),
           nb::arg("out"), nb::arg("adapters") = nb::none(), nb::arg("is_hidden") = false,
           "One step: int32 token_ids, positions and sequences [M], block_tables [S, W], the cache, rope tables, wanted "
           "[R] ascending, adapters [S] with -1 for none; fills out float32 [R, V] with logits, or with is_hidden "
           "[R, D] with the normalised rows that they are made from. Every index is checked first.")
      .def("step", &quant_step, nb::arg("token_ids"), nb::arg("positions"), nb::arg("sequences"),
           nb::arg("block_tables"), nb::arg("pages"), nb::arg("cosines"), nb::arg("sines"), nb::arg("wanted"),
           nb::arg("out"), nb::arg("adapters") = nb::none(), nb::arg("is_hidden") = false,
           "The same over a cache of 8-bit pages.");
}

}  // namespace openbook
