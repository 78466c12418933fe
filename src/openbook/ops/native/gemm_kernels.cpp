#include "gemm_kernels.h"

#include "gemm_pack.h"
#include "simd.h"

namespace openbook::OPENBOOK_ISA {
namespace {

// A tile of C lives in registers: kTileRows rows of kTileVecs vectors. Of AVX-512's 32 registers it takes 28, of AVX2's 16
// it takes 12 (a vector is two), of NEON's 32 it takes 24 (a vector is four).
#if defined(OPENBOOK_ISA_avx512)
constexpr int kTileRows = 14, kTileVecs = 2;
#elif defined(OPENBOOK_ISA_scalar)
constexpr int kTileRows = 4, kTileVecs = 1;
#else
constexpr int kTileRows = 6, kTileVecs = 1;
#endif
constexpr int kTileColumns = kTileVecs * kLanes;
static_assert(kPanelColumns % kTileColumns == 0);

template <Element E>
struct Storage {
  using Type = std::uint16_t;
};
template <>
struct Storage<Element::f32> {
  using Type = float;
};
OPENBOOK_INLINE Vec widen(const float* p, Storage<Element::f32>) { return load(p); }
OPENBOOK_INLINE Vec widen(const std::uint16_t* p, Storage<Element::bf16>) { return load_bf16(p); }
OPENBOOK_INLINE Vec widen(const std::uint16_t* p, Storage<Element::f16>) { return load_f16(p); }

// Loads or stores of a tile's row: all Vecs vectors, or `columns` of them.
template <int Vecs>
OPENBOOK_INLINE void load_tile_row(Vec (&row)[Vecs], const float* p, int columns) {
#pragma GCC unroll 2
  for (int v = 0; v < Vecs; ++v) {
    const int rest = columns - v * kLanes;
    row[v] = rest >= kLanes ? load(p + v * kLanes) : load_first(p + v * kLanes, rest);
  }
}

// One tile: Rows rows of a, Vecs vectors of columns of b, of which `columns` are stored.
template <int Rows, int Vecs, Element E>
void multiply_tile(const float* a, const void* panel, const GemmBlock& block, float* c, int columns, const float* bias) {
  const auto* b = static_cast<const typename Storage<E>::Type*>(panel);
  const std::int64_t depth = block.depth, stride = block.c_stride;
  Vec acc[Rows][Vecs];
  if (block.accumulate) {
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) load_tile_row<Vecs>(acc[i], c + i * stride, columns);
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
      for (int v = 0; v < Vecs; ++v) acc[i][v] = splat(0.0f);
    }
  }
  for (std::int64_t k = 0; k < depth; ++k) {
    Vec row[Vecs];
#pragma GCC unroll 2
    for (int v = 0; v < Vecs; ++v) row[v] = widen(b + v * kLanes, Storage<E>{});
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      const Vec one = splat(a[i]);
#pragma GCC unroll 2
      for (int v = 0; v < Vecs; ++v) acc[i][v] = fma(one, row[v], acc[i][v]);
    }
    a += Rows;
    b += kPanelColumns;
  }
  if (bias != nullptr) {
    Vec row[Vecs];
    load_tile_row<Vecs>(row, bias, columns);
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
      for (int v = 0; v < Vecs; ++v) acc[i][v] = add(acc[i][v], row[v]);
    }
  }
  if (columns == Vecs * kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
      for (int v = 0; v < Vecs; ++v) store(c + i * stride + v * kLanes, acc[i][v]);
    }
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
      for (int v = 0; v < Vecs - 1; ++v) store(c + i * stride + v * kLanes, acc[i][v]);
      store_first(c + i * stride + (Vecs - 1) * kLanes, acc[i][Vecs - 1], columns - (Vecs - 1) * kLanes);
    }
  }
}

using Tile = void (*)(const float* a, const void* panel, const GemmBlock& block, float* c, int columns, const float* bias);

// The tiles of 1 to kTileRows rows.
template <int Vecs, Element E>
struct Tiles {
  Tile of_rows[kTileRows + 1] = {};

  template <int Rows>
  constexpr void fill() {
    of_rows[Rows] = multiply_tile<Rows, Vecs, E>;
    if constexpr (Rows > 1) fill<Rows - 1>();
  }
  constexpr Tiles() { fill<kTileRows>(); }
};

template <Element E>
void multiply_as(const GemmBlock& block) {
  static constexpr Tiles<kTileVecs, E> whole;
  static constexpr Tiles<1, E> narrow;
  using Type = typename Storage<E>::Type;
  const std::int64_t num_panels = num_row_panels(block.rows, kTileRows);
  for (std::int64_t column = 0; column < block.columns; column += kTileColumns) {
    const std::int64_t rest = block.columns - column;
    const int columns = static_cast<int>(rest < kTileColumns ? rest : kTileColumns);
    const Type* panel = static_cast<const Type*>(block.b) + column / kPanelColumns * block.panel_stride + column % kPanelColumns;
    const float* bias = block.bias == nullptr ? nullptr : block.bias + column;
    for (std::int64_t i = 0; i < num_panels; ++i) {
      const std::int64_t begin = i * block.rows / num_panels, rows = (i + 1) * block.rows / num_panels - begin;
      const Tile tile = columns > kLanes ? whole.of_rows[rows] : narrow.of_rows[rows];
      tile(block.a + begin * block.depth, panel, block, block.c + begin * block.c_stride + column, columns, bias);
    }
  }
}

void multiply(const GemmBlock& block) {
  switch (block.element) {
    case Element::f32:
      return multiply_as<Element::f32>(block);
    case Element::bf16:
      return multiply_as<Element::bf16>(block);
    case Element::f16:
      return multiply_as<Element::f16>(block);
  }
}

void pack(const float* from, std::int64_t lane_stride, std::int64_t k_stride, std::int64_t lanes, std::int64_t width,
          std::int64_t depth, float* to) {
  pack_panel(from, lane_stride, k_stride, lanes, width, depth, to);
}

}  // namespace

extern const GemmKernels gemm_kernels = {kTileRows, pack, multiply};

}  // namespace openbook::OPENBOOK_ISA
