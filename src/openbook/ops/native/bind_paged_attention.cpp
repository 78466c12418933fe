#include <nanobind/stl/optional.h>

#include <optional>

#include "bindings.h"
#include "paged_attention.h"
#include "quant.h"
#include "quant_attention.h"
#include "thread_pool.h"

namespace openbook {
namespace {

using Indices1 = Array<const std::int32_t, 1>;
using Indices2 = Array<const std::int32_t, 2>;

std::int64_t size(const auto& array, std::size_t axis) { return static_cast<std::int64_t>(array.shape(axis)); }

PagedCache cache_of(const Floats4& keys, const Floats4& values, const Indices2& block_tables) {
  if (size(keys, 3) != kPageTokens || size(values, 2) != kPageTokens || keys.shape(0) != values.shape(0) ||
      keys.shape(1) != values.shape(1) || keys.shape(2) != values.shape(3)) {
    throw nb::value_error("paged cache: expected keys [pages, K, H, 16] and values [pages, K, 16, H]");
  }
  return {keys.data(), values.data(), size(keys, 1), size(keys, 2), block_tables.data(), size(block_tables, 1)};
}

// Each row must lie inside the table, and the pages that it reads inside the cache.
void check_rows(const Indices1& sequences, const Indices1& positions, const Indices2& block_tables,
                std::int64_t num_pages, std::int64_t window) {
  if (sequences.shape(0) != positions.shape(0)) {
    throw nb::value_error("paged cache: expected as many sequences as positions, one a row");
  }
  for (std::int64_t row = 0; row < size(sequences, 0); ++row) {
    const std::int64_t sequence = sequences.data()[row], position = positions.data()[row];
    if (sequence < 0 || sequence >= size(block_tables, 0) || position < 0 ||
        position / kPageTokens >= size(block_tables, 1)) {
      throw nb::value_error("paged cache: a row's sequence or position lies outside of the block tables");
    }
    const std::int64_t first = window != 0 && position >= window ? position - window + 1 : 0;
    for (std::int64_t page = first / kPageTokens; page <= position / kPageTokens; ++page) {
      const std::int32_t at = block_tables.data()[sequence * size(block_tables, 1) + page];
      if (at < 0 || at >= num_pages) throw nb::value_error("paged cache: a block table names a page that is not there");
    }
  }
}

void write(Floats4 keys, Floats4 values, Indices2 block_tables, Indices1 sequences, Indices1 positions, ConstFloats3 k,
           ConstFloats3 v) {
  const PagedCache cache = cache_of(keys, values, block_tables);
  check_rows(sequences, positions, block_tables, size(keys, 0), 1);
  if (k.shape(0) != sequences.shape(0) || v.shape(0) != k.shape(0) || size(k, 1) != cache.num_kv_heads ||
      v.shape(1) != k.shape(1) || size(k, 2) != cache.head_dim || v.shape(2) != k.shape(2)) {
    throw nb::value_error("write_kv: expected k and v [M, K, H]");
  }
  const std::int64_t rows = size(k, 0), row_size = cache.num_kv_heads * cache.head_dim;
  const std::int32_t *row_sequences = sequences.data(), *row_positions = positions.data();
  const float *from_k = k.data(), *from_v = v.data();
  const nb::gil_scoped_release release;
  parallel_ranges(rows, 16, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      write_kv(cache, row_sequences[row], row_positions[row], from_k + row * row_size, from_v + row * row_size);
    }
  });
}

PagedQueries queries_of(const ConstFloats3& q, const Indices1& sequences, const Indices1& positions, float scale,
                        std::int64_t window, const std::optional<ConstFloats1>& sinks, const Floats3& out,
                        std::int64_t num_kv_heads) {
  if (window < 0) throw nb::value_error("paged_attention: the window is negative, expected a number of tokens, or 0 for all");
  if (q.shape(0) != sequences.shape(0) || num_kv_heads == 0 || size(q, 1) % num_kv_heads != 0 ||
      out.shape(0) != q.shape(0) || out.shape(1) != q.shape(1) || out.shape(2) != q.shape(2) ||
      (sinks && sinks->shape(0) != q.shape(1))) {
    throw nb::value_error("paged_attention: expected q and out [M, N, H], K a divisor of N, sinks [N]");
  }
  return {size(q, 0), sequences.data(), positions.data(), q.data(), size(q, 1) * size(q, 2),
          size(q, 1), scale, window, sinks ? sinks->data() : nullptr, out.data()};
}

void attend(ConstFloats3 q, Floats4 keys, Floats4 values, Indices2 block_tables, Indices1 sequences, Indices1 positions,
            float scale, std::int64_t window, std::optional<ConstFloats1> sinks, Floats3 out) {
  const PagedCache cache = cache_of(keys, values, block_tables);
  if (size(q, 2) != cache.head_dim) throw nb::value_error("paged_attention: expected q with as many features as keys");
  const PagedQueries queries = queries_of(q, sequences, positions, scale, window, sinks, out, cache.num_kv_heads);
  check_rows(sequences, positions, block_tables, size(keys, 0), window);
  const nb::gil_scoped_release release;
  paged_attention(cache, queries);
}

using Pages = Array<std::uint8_t, 3>;

QuantCache cache_of(const Pages& pages, std::int64_t head_dim, const Indices2& block_tables) {
  if (head_dim % kQuantBlock != 0 || size(pages, 2) != quant_page_bytes(head_dim)) {
    throw nb::value_error(
        "paged cache: expected pages uint8 [pages, K, quant_page_bytes(H)], H a multiple of 32 features");
  }
  return {pages.data(), size(pages, 1), head_dim, block_tables.data(), size(block_tables, 1)};
}

void write_quant(Pages pages, Indices2 block_tables, Indices1 sequences, Indices1 positions, ConstFloats3 k,
                 ConstFloats3 v) {
  const QuantCache cache = cache_of(pages, size(k, 2), block_tables);
  check_rows(sequences, positions, block_tables, size(pages, 0), 1);
  if (k.shape(0) != sequences.shape(0) || v.shape(0) != k.shape(0) || size(k, 1) != cache.num_kv_heads ||
      v.shape(1) != k.shape(1) || v.shape(2) != k.shape(2)) {
    throw nb::value_error("write_quant_kv: expected k and v [M, K, H]");
  }
  const std::int64_t row_size = cache.num_kv_heads * cache.head_dim;
  const std::int32_t *row_sequences = sequences.data(), *row_positions = positions.data();
  const float *from_k = k.data(), *from_v = v.data();
  const nb::gil_scoped_release release;
  parallel_for(size(k, 0), [&](std::int64_t row) {
    write_quant_kv(cache, row_sequences[row], row_positions[row], from_k + row * row_size, from_v + row * row_size);
  });
}

void attend_quant(ConstFloats3 q, Pages pages, Indices2 block_tables, Indices1 sequences, Indices1 positions,
                  float scale, std::int64_t window, std::optional<ConstFloats1> sinks, Floats3 out) {
  const QuantCache cache = cache_of(pages, size(q, 2), block_tables);
  const PagedQueries queries = queries_of(q, sequences, positions, scale, window, sinks, out, cache.num_kv_heads);
  check_rows(sequences, positions, block_tables, size(pages, 0), window);
  const nb::gil_scoped_release release;
  quant_paged_attention(cache, queries);
}

}  // namespace

void bind_paged_attention(nb::module_& m) {
  m.def("write_kv", &write, nb::arg("keys"), nb::arg("values"), nb::arg("block_tables"), nb::arg("sequences"),
        nb::arg("positions"), nb::arg("k"), nb::arg("v"),
        "Puts k, v float32 [M, K, H] into the cache of a layer: keys [pages, K, H, 16], values [pages, K, 16, H]; "
        "int32 block_tables [sequences, width], sequences [M], positions [M].");
  m.def("paged_attention", &attend, nb::arg("q"), nb::arg("keys"), nb::arg("values"), nb::arg("block_tables"),
        nb::arg("sequences"), nb::arg("positions"), nb::arg("scale"), nb::arg("window"), nb::arg("sinks").none(),
        nb::arg("out"),
        "float32 q [M, N, H] to out [M, N, H]: each row over its own sequence up to its position, the latest `window` "
        "tokens of it (0: all); sinks [N] or None.");
  m.def("quant_page_bytes", &quant_page_bytes, nb::arg("head_dim"),
        "Bytes of 16 tokens of one head in a cache of 8 bits; head_dim is a multiple of 32.");
  m.def("write_quant_kv", &write_quant, nb::arg("pages"), nb::arg("block_tables"), nb::arg("sequences"),
        nb::arg("positions"), nb::arg("k"), nb::arg("v"),
        "Rounds k, v float32 [M, K, H] into pages uint8 [pages, K, quant_page_bytes(H)] of a layer.");
  m.def("quant_paged_attention", &attend_quant, nb::arg("q"), nb::arg("pages"), nb::arg("block_tables"),
        nb::arg("sequences"), nb::arg("positions"), nb::arg("scale"), nb::arg("window"), nb::arg("sinks").none(),
        nb::arg("out"), "The same as paged_attention over such pages, by the rules of quant_attention.h.");
}

}  // namespace openbook
