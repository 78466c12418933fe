#include "gemm.h"

#include <algorithm>
#include <cstring>

#include "scratch.h"
#include "thread_pool.h"

namespace openbook {
namespace {

// k is cut into pieces of this length, so that a piece of a row block stays in the second-level cache.
constexpr std::int64_t kDepth = 512;
// Row tiles that one task packs and multiplies at a time.
constexpr std::int64_t kTilesOfBlock = 6;
// A packed B is at most this large; of a wider one as many columns are packed at a time.
constexpr std::int64_t kPackedBytes = std::int64_t{16} << 20;
// With fewer multiply-adds than this, waking threads costs more than it gives.
constexpr std::int64_t kSerialWork = 64 * 1024;
// `pack` writes so many floats past what it packs.
constexpr std::int64_t kSlack = 16;

float* float_scratch(Scratch use, std::int64_t count) {
  return static_cast<float*>(scratch(use, static_cast<std::size_t>(count + kSlack) * sizeof(float)));
}

std::int64_t element_bytes(Element element) { return element == Element::f32 ? 4 : 2; }

const void* advance(const void* data, Element element, std::int64_t count) {
  return static_cast<const char*>(data) + element_bytes(element) * count;
}

// Everything about a product but A and B.
struct Output {
  float* c;
  std::int64_t stride;
  bool accumulate;
  const float* bias;
};

// Some rows of A times a packed B. `packed_a` has what pack_all_a makes of them, or is null.
void multiply_rows(const GemmKernels& kernels, Strided a, std::int64_t rows, const float* packed_a,
                   const PackedWeight& b, const Output& out) {
  for (std::int64_t k = 0; k < b.k || k == 0; k += kDepth) {
    const std::int64_t depth = std::min(kDepth, b.k - k);
    const float* from;
    if (packed_a != nullptr) {
      from = packed_a + rows * k;
    } else {
      float* packed = float_scratch(Scratch::rows, rows * depth);
      kernels.pack_a(a.from(0, k), rows, depth, packed);
      from = packed;
    }
    kernels.multiply({.a = from,
                      .rows = rows,
                      .b = advance(b.data, b.element, k * kPanelColumns),
                      .element = b.element,
                      .panel_stride = b.k * kPanelColumns,
                      .columns = b.n,
                      .depth = depth,
                      .c = out.c,
                      .c_stride = out.stride,
                      .accumulate = out.accumulate || k > 0,
                      .bias = k + depth == b.k ? out.bias : nullptr});
  }
}

// Few rows, packed once for all columns: the pieces of k one behind another.
const float* pack_all_a(const GemmKernels& kernels, Strided a, std::int64_t rows, std::int64_t k) {
  if (rows == 1 && a.column_stride == 1) return a.data;
  float* packed = float_scratch(Scratch::columns, rows * k);
  for (std::int64_t begin = 0; begin < k; begin += kDepth) {
    kernels.pack_a(a.from(0, begin), rows, std::min(kDepth, k - begin), packed + rows * begin);
  }
  return packed;
}

PackedWeight panels(const PackedWeight& b, std::int64_t begin, std::int64_t end) {
  const std::int64_t column = begin * kPanelColumns;
  return {advance(b.data, b.element, column * b.k), std::min(b.n, end * kPanelColumns) - column, b.k, b.element};
}

Output columns_from(const Output& out, std::int64_t column) {
  return {out.c + column, out.stride, out.accumulate, out.bias == nullptr ? nullptr : out.bias + column};
}

// How a product is cut: row blocks times column chunks, each a task.
struct Cut {
  std::int64_t blocks;
  std::int64_t chunks;
};

Cut cut(std::int64_t row_tiles, std::int64_t column_panels, std::int64_t threads) {
  std::int64_t blocks = (row_tiles + kTilesOfBlock - 1) / kTilesOfBlock;
  if (threads == 1) return {blocks, 1};
  // Some tasks for each thread, as no two are equally fast.
  const std::int64_t wanted = 4 * threads;
  // Few rows: every panel of B, which may lie in memory, is read once.
  if (blocks == 1 && column_panels >= wanted) return {1, wanted};
  blocks = std::min(row_tiles, std::max(wanted, (blocks + threads - 1) / threads * threads));
  return {blocks, std::min(column_panels, std::max(std::int64_t{1}, wanted / blocks))};
}

// All of A times a packed B, over the pool.
void multiply_packed(const GemmKernels& kernels, Strided a, std::int64_t m, const PackedWeight& b, const Output& out) {
  const std::int64_t row_tiles = num_row_panels(m, kernels.tile_rows), num_panels = b.num_panels();
  const Cut tasks = cut(row_tiles, num_panels, m * b.n * b.k < kSerialWork ? 1 : num_threads());
  const float* packed_a = tasks.blocks == 1 ? pack_all_a(kernels, a, m, b.k) : nullptr;
  parallel_for(tasks.blocks * tasks.chunks, [&](std::int64_t task) {
    const std::int64_t block = task / tasks.chunks, chunk = task % tasks.chunks;
    const std::int64_t begin = block * m / tasks.blocks, end = (block + 1) * m / tasks.blocks;
    const std::int64_t first = chunk * num_panels / tasks.chunks, last = (chunk + 1) * num_panels / tasks.chunks;
    Output part = columns_from(out, first * kPanelColumns);
    part.c += begin * out.stride;
    multiply_rows(kernels, a.from(begin, 0), end - begin, packed_a, panels(b, first, last), part);
  });
}

}  // namespace

void gemm(std::int64_t m, std::int64_t n, std::int64_t k, Strided a, Strided b, float* c, std::int64_t c_stride,
          bool accumulate, const float* bias) {
  if (m <= 0 || n <= 0) return;
  const GemmKernels& kernels = gemm_kernels();
  const Output out{c, c_stride, accumulate, bias};
  const std::int64_t panel_bytes = (k + 1) * kPanelColumns * element_bytes(Element::f32);
  const std::int64_t width = (1 + kPackedBytes / panel_bytes) * kPanelColumns;
  for (std::int64_t column = 0; column < n; column += width) {
    const std::int64_t columns = std::min(width, n - column);
    PackedWeight packed{nullptr, columns, k, Element::f32};
    float* to = float_scratch(Scratch::shared, packed.num_panels() * kPanelColumns * k);
    packed.data = to;
    const std::int64_t grain = 1 + kSerialWork / 8 / (k * kPanelColumns + 1);
    parallel_ranges(packed.num_panels(), grain, [&](std::int64_t begin, std::int64_t end) {
      const std::int64_t first = begin * kPanelColumns, last = std::min(columns, end * kPanelColumns);
      kernels.pack_b(b.from(0, column + first), last - first, k, to + first * k);
    });
    multiply_packed(kernels, a, m, packed, columns_from(out, column));
  }
}

void gemm_serial(std::int64_t m, std::int64_t n, std::int64_t k, Strided a, Strided b, float* c, std::int64_t c_stride,
                 bool accumulate, const float* bias) {
  if (m <= 0 || n <= 0) return;
  const GemmKernels& kernels = gemm_kernels();
  const std::int64_t rows = kTilesOfBlock * kernels.tile_rows;
  // B a piece of k at a time and a few panels of it.
  constexpr std::int64_t width = 16 * kPanelColumns;
  for (std::int64_t column = 0; column < n; column += width) {
    const std::int64_t columns = std::min(width, n - column);
    for (std::int64_t from = 0; from < k || from == 0; from += kDepth) {
      const std::int64_t depth = std::min(kDepth, k - from);
      PackedWeight packed{nullptr, columns, depth, Element::f32};
      float* to = float_scratch(Scratch::columns, packed.num_panels() * kPanelColumns * depth);
      packed.data = to;
      kernels.pack_b(b.from(from, column), columns, depth, to);
      Output out = columns_from({c, c_stride, accumulate || from > 0, from + depth == k ? bias : nullptr}, column);
      for (std::int64_t row = 0; row < m; row += rows, out.c += rows * c_stride) {
        multiply_rows(kernels, a.from(row, from), std::min(rows, m - row), nullptr, packed, out);
      }
    }
  }
}

std::size_t packed_bytes(std::int64_t n, std::int64_t k, Element element) {
  return static_cast<std::size_t>((n + kPanelColumns - 1) / kPanelColumns * kPanelColumns * k * element_bytes(element));
}

void pack_weight(const void* weight, std::int64_t n, std::int64_t k, Element element, void* to) {
  const std::int64_t num_panels = (n + kPanelColumns - 1) / kPanelColumns;
  const GemmKernels& kernels = gemm_kernels();
  parallel_ranges(num_panels, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t panel = begin; panel < end; ++panel) {
      const std::int64_t row = panel * kPanelColumns, rows = std::min(kPanelColumns, n - row);
      if (element == Element::f32) {
        kernels.pack_b({static_cast<const float*>(weight) + row * k, 1, k}, rows, k, static_cast<float*>(to) + row * k);
        continue;
      }
      const auto* from = static_cast<const std::uint16_t*>(weight) + row * k;
      auto* into = static_cast<std::uint16_t*>(to) + row * k;
      if (rows < kPanelColumns) std::memset(into, 0, static_cast<std::size_t>(kPanelColumns * k) * 2);
      for (std::int64_t j = 0; j < rows; ++j) {
        for (std::int64_t i = 0; i < k; ++i) into[i * kPanelColumns + j] = from[j * k + i];
      }
    }
  });
}

namespace {

float float_of_bits(std::uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

float float_of_half(std::uint16_t half) {
  const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000) << 16, rest = half & 0x7fff;
  if (rest >= 0x7c00) return float_of_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  if (rest < 0x400) {  // zero and subnormals: a whole number times 2^-24, exact in float32
    const float magnitude = static_cast<float>(rest) * 0x1p-24f;
    return sign != 0 ? -magnitude : magnitude;
  }
  return float_of_bits(sign | ((rest << 13) + (112u << 23)));
}

}  // namespace

void packed_row(const PackedWeight& weight, std::int64_t row, float* out) {
  const std::int64_t first = row / kPanelColumns * kPanelColumns * weight.k + row % kPanelColumns;
  const auto* floats = static_cast<const float*>(weight.data) + first;
  const auto* halves = static_cast<const std::uint16_t*>(weight.data) + first;
  for (std::int64_t i = 0; i < weight.k; ++i) {
    const std::int64_t at = i * kPanelColumns;
    switch (weight.element) {
      case Element::f32:
        out[i] = floats[at];
        break;
      case Element::bf16:
        out[i] = float_of_bits(static_cast<std::uint32_t>(halves[at]) << 16);
        break;
      case Element::f16:
        out[i] = float_of_half(halves[at]);
        break;
    }
  }
}

void packed_linear(const PackedWeight& weight, const float* x, std::int64_t x_stride, std::int64_t m, const float* bias,
                   float* out, std::int64_t out_stride) {
  if (m <= 0 || weight.n <= 0) return;
  multiply_packed(gemm_kernels(), {x, x_stride, 1}, m, weight, {out, out_stride, false, bias});
}

void packed_linear_range(const PackedWeight& weight, std::int64_t begin, std::int64_t end, const float* x,
                         std::int64_t x_stride, std::int64_t m, const float* bias, float* out, std::int64_t out_stride) {
  const GemmKernels& kernels = gemm_kernels();
  const std::int64_t block = kTilesOfBlock * kernels.tile_rows;
  const PackedWeight part = panels(weight, begin, end);
  Output to = columns_from({out, out_stride, false, bias}, begin * kPanelColumns);
  for (std::int64_t row = 0; row < m; row += block, to.c += block * out_stride) {
    const Strided from{x + row * x_stride, x_stride, 1};
    const std::int64_t rows = std::min(block, m - row);
    multiply_rows(kernels, from, rows, rows == 1 ? from.data : nullptr, part, to);
  }
}

}  // namespace openbook
