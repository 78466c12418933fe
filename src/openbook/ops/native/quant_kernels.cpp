#include "quant_kernels.h"

#include "quant_dot.h"
#include "quant_rows.h"
#include "simd.h"

namespace openbook::OPENBOOK_ISA {
namespace {

constexpr int kPanelVecs = kPanelRows / kLanes;

void quantize_row(const float* x, std::int64_t num_blocks, QuantBlock* out) {
  for (std::int64_t b = 0; b < num_blocks; ++b, x += kQuantBlock) {
    QuantBlock& block = out[b];
    prefetch_to_write(&block + 16);
    const RoundedBlock rounded = round_block(x, block.codes);
    block.scale = round_to_half(rounded.scale);
    block.sum = round_to_half(rounded.scale * static_cast<float>(rounded.sum));
    block.start_q8 = -128 * rounded.sum;
    block.start_q4 = -8 * rounded.sum;
  }
}

// Weights to ask the memory for while others are multiplied: so many lines of 64 bytes for each block.
struct Ahead {
  const std::uint8_t* data;
  int num_lines;
};

// Rows x[0 .. Rows) by vectors [first, first + Vecs) of 16 outputs of a panel.
template <QuantKind Kind, int Rows, int Vecs>
OPENBOOK_INLINE void tile(const std::uint8_t* w, std::int64_t num_blocks, const QuantBlock* x, int first, Ahead ahead,
                          Vec (&acc)[Rows][Vecs]) {
  constexpr std::int64_t kBlockBytes = panel_block_bytes(Kind);
  constexpr std::int64_t kNear = (1024 / kBlockBytes + 1) * kBlockBytes;  // further ahead is slower (measured)
  constexpr std::int64_t kCodes = Kind == QuantKind::q4_1 ? 128 : 64;  // where codes start
  const std::uint8_t* scales = w + 32 * first;
  const std::uint8_t* codes = w + kCodes + 64 * first;
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < Vecs; ++v) acc[r][v] = splat(0.0f);
  }
  for (std::int64_t b = 0; b < num_blocks; ++b, ++x, scales += kBlockBytes, codes += kBlockBytes) {
    if constexpr (Rows == 1) {
#pragma GCC unroll 17
      for (std::int64_t i = 0; i < kBlockBytes; i += 64) __builtin_prefetch(scales + kNear + i, 0, 2);
    }
    for (int i = 0; i < ahead.num_lines; ++i, ahead.data += 64) __builtin_prefetch(ahead.data, 0, 2);
    Ints sum[Rows][Vecs];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const QuantBlock& block = x[r * num_blocks];
#pragma GCC unroll 2
      for (int v = 0; v < Vecs; ++v) {
        sum[r][v] = Kind == QuantKind::q4_0                  ? splat_int(&block.start_q4)
                    : Kind == QuantKind::q8_0 && kHasOffset ? splat_int(&block.start_q8)
                                                            : zero_ints();
      }
    }
    if constexpr (Kind == QuantKind::q8_0) {
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) {
        Codes8 four[Vecs];
#pragma GCC unroll 2
        for (int v = 0; v < Vecs; ++v) four[v] = load_codes8(codes + 64 * (kPanelVecs * j + v));
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) {
          const Fours q = splat_four(x[r * num_blocks].codes + 4 * j);
#pragma GCC unroll 2
          for (int v = 0; v < Vecs; ++v) sum[r][v] = dot(sum[r][v], four[v], q);
        }
      }
    } else {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        Nibbles four[Vecs];
#pragma GCC unroll 2
        for (int v = 0; v < Vecs; ++v) four[v] = load_nibbles(codes + 64 * (kPanelVecs * j + v));
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) {
          const Fours low = splat_four(x[r * num_blocks].codes + 4 * j);
          const Fours high = splat_four(x[r * num_blocks].codes + 4 * j + 16);
#pragma GCC unroll 2
          for (int v = 0; v < Vecs; ++v) {
            sum[r][v] = dot(dot(sum[r][v], four[v].low, low), four[v].high, high);
          }
        }
      }
    }
    Vec scale[Vecs], least[Vecs];
#pragma GCC unroll 2
    for (int v = 0; v < Vecs; ++v) {
      scale[v] = load_f16(reinterpret_cast<const std::uint16_t*>(scales + 32 * v));
      if constexpr (Kind == QuantKind::q4_1) {
        least[v] = load_f16(reinterpret_cast<const std::uint16_t*>(scales + 64 + 32 * v));
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const QuantBlock& block = x[r * num_blocks];
#pragma GCC unroll 2
      for (int v = 0; v < Vecs; ++v) {
        acc[r][v] = fma(to_floats(sum[r][v]), mul(scale[v], splat(block.scale)), acc[r][v]);
        if constexpr (Kind == QuantKind::q4_1) acc[r][v] = fma(least[v], splat(block.sum), acc[r][v]);
      }
    }
  }
}

struct Outputs {
  float* out;  // of the first row
  std::int64_t stride;
  const float* bias;  // or null
  std::int64_t num_columns;
};

template <QuantKind Kind, int Rows, int Vecs>
void tile_columns(const QuantView& w, std::int64_t panel, const QuantBlock* x, Ahead ahead, const Outputs& y) {
  const std::uint8_t* data = w.data + panel * w.num_blocks() * panel_block_bytes(Kind);
  for (int first = 0; first < kPanelVecs; first += Vecs) {
    const std::int64_t column = panel * kPanelRows + first * kLanes;
    if (column >= y.num_columns) return;
    Vec acc[Rows][Vecs];
    tile<Kind, Rows, Vecs>(data, w.num_blocks(), x, first, ahead, acc);
#pragma GCC unroll 2
    for (int v = 0; v < Vecs; ++v) {
      const std::int64_t at = column + v * kLanes, rest = y.num_columns - at;
      if (rest <= 0) return;
      const int count = rest < kLanes ? static_cast<int>(rest) : kLanes;
      const Vec bias = y.bias == nullptr ? splat(0.0f) : load_first(y.bias + at, count);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        const Vec result = y.bias == nullptr ? acc[r][v] : add(acc[r][v], bias);
        store_first(y.out + r * y.stride + at, result, count);
      }
    }
  }
}

template <QuantKind Kind, int Rows>
void tile_rows(int rows, const QuantView& w, std::int64_t panel, const QuantBlock* x, Ahead ahead,
               const Outputs& y) {
  if constexpr (Rows > 1) {
    if (rows < Rows) return tile_rows<Kind, Rows - 1>(rows, w, panel, x, ahead, y);
  }
  tile_columns<Kind, Rows, (Rows == 1 ? kPanelVecs : kProductVecs)>(w, panel, x, ahead, y);
}

template <QuantKind Kind>
void linear_of(const QuantView& w, const QuantBlock* x, std::int64_t num_rows, const Outputs& y, std::int64_t begin,
               std::int64_t end) {
  // As few tiles as can be, and all about as tall.
  const std::int64_t num_tiles = (num_rows + kProductRows - 1) / kProductRows;
  // Each tile asks for its share of the next panel. One tile alone is as fast as memory, which sees what comes.
  constexpr std::int64_t kLines = panel_block_bytes(Kind) / 64;
  const int num_lines = num_tiles > 1 ? static_cast<int>((kLines + num_tiles - 1) / num_tiles) : 0;
  for (std::int64_t panel = begin; panel < end; ++panel) {
    const std::uint8_t* next_panel = w.data + (panel + 1) * w.panel_bytes();
    for (std::int64_t t = 0; t < num_tiles; ++t) {
      const std::int64_t row = num_rows * t / num_tiles, next = num_rows * (t + 1) / num_tiles;
      const Outputs part = {y.out + row * y.stride, y.stride, y.bias, y.num_columns};
      tile_rows<Kind, kProductRows>(static_cast<int>(next - row), w, panel, x + row * w.num_blocks(),
                                 Ahead{next_panel + t * w.num_blocks() * num_lines * 64, num_lines}, part);
    }
  }
}

void linear(const QuantView& w, const QuantBlock* x, std::int64_t num_rows, const float* bias, float* out,
            std::int64_t stride, std::int64_t begin, std::int64_t end) {
  const Outputs y = {out, stride, bias, w.num_rows};
  switch (w.kind) {
    case QuantKind::q8_0:
      return linear_of<QuantKind::q8_0>(w, x, num_rows, y, begin, end);
    case QuantKind::q4_0:
      return linear_of<QuantKind::q4_0>(w, x, num_rows, y, begin, end);
    case QuantKind::q4_1:
      return linear_of<QuantKind::q4_1>(w, x, num_rows, y, begin, end);
  }
}

void dequantize_row(const QuantView& w, std::int64_t row, float* out) {
  const std::int64_t panel = row / kPanelRows, lane = row % kPanelRows, bytes = panel_block_bytes(w.kind);
  const std::int64_t codes_at = (w.kind == QuantKind::q4_1 ? 128 : 64) + 4 * lane;
  const std::uint8_t* block = w.data + panel * w.panel_bytes();
  for (std::int64_t b = 0; b < w.num_blocks(); ++b, block += bytes, out += kQuantBlock) {
    const std::uint16_t* scales = reinterpret_cast<const std::uint16_t*>(block) + lane / kLanes * kLanes;
    float scale[kLanes], least[kLanes] = {};
    store(scale, load_f16(scales));
    if (w.kind == QuantKind::q4_1) store(least, load_f16(scales + kPanelRows));
    const float d = scale[lane % kLanes], m = least[lane % kLanes];
    for (int k = 0; k < kQuantBlock; ++k) {
      if (w.kind == QuantKind::q8_0) {
        out[k] = d * static_cast<float>(block[codes_at + k / 4 * 128 + k % 4] - 128);
      } else {
        const int both = block[codes_at + k % 16 / 4 * 128 + k % 4], code = k < 16 ? both & 15 : both >> 4;
        out[k] = w.kind == QuantKind::q4_0 ? d * static_cast<float>(code - 8) : d * static_cast<float>(code) + m;
      }
    }
  }
}

}  // namespace

extern const QuantKernels quant_kernels = {quantize_row, linear, dequantize_row};

}  // namespace openbook::OPENBOOK_ISA
