#include "gemm_kernels.h"

#include "gemm_pack.h"
#include "simd.h"

namespace openbook::OPENBOOK_ISA {
namespace {

// A tile of C lives in registers: kTileRows rows of kTileVecs vectors. Of AVX-512's 32 registers it takes 28, of AVX2's
// 16 it takes 12 (a vector is two), of NEON's 32 it takes 24 (a vector is four).
#if defined(OPENBOOK_ISA_avx512)
constexpr int kTileRows = 14, kTileVecs = 2;
#elif defined(OPENBOOK_ISA_scalar)
constexpr int kTileRows = 4, kTileVecs = 1;
#else
constexpr int kTileRows = 6, kTileVecs = 1;
#endif
static_assert(kPanelColumns == kLanes);

// Few rows leave registers for more columns, whose chains of multiply-adds run beside each other.
constexpr int most_vecs(int rows) {
  const int vecs = kTileRows * kTileVecs / rows;
  return vecs >= 4 ? 4 : vecs >= 2 ? 2 : 1;
}

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

// A row of a tile, or the first `columns` of it; only the last vector is ever partial.
template <int Vecs>
OPENBOOK_INLINE void load_tile_row(Vec (&row)[Vecs], const float* p, int columns) {
#pragma GCC unroll 4
  for (int v = 0; v < Vecs - 1; ++v) row[v] = load(p + v * kLanes);
  constexpr int last = (Vecs - 1) * kLanes;
  row[Vecs - 1] = columns == Vecs * kLanes ? load(p + last) : load_first(p + last, columns - last);
}

// One tile: Rows rows of a, the Vecs panels from `panel` on, of which `columns` columns are stored.
template <int Rows, int Vecs, Element E>
void multiply_tile(const float* a, const void* panel, const GemmBlock& block, float* c, int columns,
                   const float* bias) {
  const auto* b = static_cast<const typename Storage<E>::Type*>(panel);
  const std::int64_t depth = block.depth, stride = block.c_stride, panel_stride = block.panel_stride;
  Vec acc[Rows][Vecs];
  if (block.accumulate) {
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) load_tile_row<Vecs>(acc[i], c + i * stride, columns);
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < Vecs; ++v) acc[i][v] = splat(0.0f);
    }
  }
  for (std::int64_t k = 0; k < depth; ++k) {
    Vec row[Vecs];
#pragma GCC unroll 4
    for (int v = 0; v < Vecs; ++v) row[v] = widen(b + v * panel_stride, Storage<E>{});
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      const Vec one = splat(a[i]);
#pragma GCC unroll 4
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
#pragma GCC unroll 4
      for (int v = 0; v < Vecs; ++v) acc[i][v] = add(acc[i][v], row[v]);
    }
  }
  if (columns == Vecs * kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < Vecs; ++v) store(c + i * stride + v * kLanes, acc[i][v]);
    }
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < Vecs - 1; ++v) store(c + i * stride + v * kLanes, acc[i][v]);
      store_first(c + i * stride + (Vecs - 1) * kLanes, acc[i][Vecs - 1], columns - (Vecs - 1) * kLanes);
    }
  }
}

using Tile = void (*)(const float* a, const void* panel, const GemmBlock& block, float* c, int columns,
                      const float* bias);

// The tiles of 1 to kTileRows rows and 1, 2 or 4 vectors.
template <Element E>
struct Tiles {
  Tile of[kTileRows + 1][5] = {};

  template <int Rows>
  constexpr void fill() {
    of[Rows][1] = multiply_tile<Rows, 1, E>;
    if constexpr (most_vecs(Rows) >= 2) of[Rows][2] = multiply_tile<Rows, 2, E>;
    if constexpr (most_vecs(Rows) >= 4) of[Rows][4] = multiply_tile<Rows, 4, E>;
    if constexpr (Rows > 1) fill<Rows - 1>();
  }
  constexpr Tiles() { fill<kTileRows>(); }
};

template <Element E>
void multiply_as(const GemmBlock& block) {
  static constexpr Tiles<E> tiles;
  const std::int64_t num_panels = num_row_panels(block.rows, kTileRows);
  const int most = num_panels == 1 ? most_vecs(static_cast<int>(block.rows)) : kTileVecs;
  int vecs = most;
  for (std::int64_t column = 0; column < block.columns; column += vecs * kLanes) {
    const std::int64_t rest = block.columns - column;
    while ((vecs - 1) * kLanes >= rest) vecs /= 2;
    const int columns = static_cast<int>(rest < vecs * kLanes ? rest : vecs * kLanes);
    const auto* panel = static_cast<const typename Storage<E>::Type*>(block.b) + column / kLanes * block.panel_stride;
    const float* bias = block.bias == nullptr ? nullptr : block.bias + column;
    for (std::int64_t i = 0; i < num_panels; ++i) {
      const std::int64_t begin = i * block.rows / num_panels, rows = (i + 1) * block.rows / num_panels - begin;
      float* c = block.c + begin * block.c_stride + column;
      tiles.of[rows][vecs](block.a + begin * block.depth, panel, block, c, columns, bias);
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

void pack_a(const Strided& a, std::int64_t rows, std::int64_t depth, float* to) {
  pack_panels(a, {rows, num_row_panels(rows, kTileRows), 0}, depth, to);
}

void pack_b(const Strided& b, std::int64_t columns, std::int64_t depth, float* to) {
  pack_panels({b.data, b.column_stride, b.row_stride}, {columns, (columns + kLanes - 1) / kLanes, kLanes}, depth, to);
}

}  // namespace

extern const GemmKernels gemm_kernels = {kTileRows, pack_a, pack_b, multiply};

}  // namespace openbook::OPENBOOK_ISA
