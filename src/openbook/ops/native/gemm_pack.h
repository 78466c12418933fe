// Packing of panels (gemm_kernels.h says their layout). Included by kernel sources only.
#pragma once

#include "gemm_kernels.h"
#include "simd.h"

namespace openbook::OPENBOOK_ISA {

// A square of floats, one register a row, that can be transposed.
#if defined(OPENBOOK_ISA_avx512)

constexpr int kSquare = 16;
using Row = __m512;
OPENBOOK_INLINE Row load_row(const float* p) { return _mm512_loadu_ps(p); }
OPENBOOK_INLINE void store_row(float* p, Row a) { _mm512_storeu_ps(p, a); }
OPENBOOK_INLINE Row zero_row() { return _mm512_setzero_ps(); }
OPENBOOK_INLINE void transpose(Row (&r)[kSquare]) {
  Row t[kSquare];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4) {
    const Row a = _mm512_unpacklo_ps(r[i], r[i + 1]), b = _mm512_unpackhi_ps(r[i], r[i + 1]);
    const Row c = _mm512_unpacklo_ps(r[i + 2], r[i + 3]), d = _mm512_unpackhi_ps(r[i + 2], r[i + 3]);
    t[i] = _mm512_shuffle_ps(a, c, 0x44);
    t[i + 1] = _mm512_shuffle_ps(a, c, 0xee);
    t[i + 2] = _mm512_shuffle_ps(b, d, 0x44);
    t[i + 3] = _mm512_shuffle_ps(b, d, 0xee);
  }
  // t[4 g + j]: in its 128-bit lane q, column 4 q + j of rows 4 g to 4 g + 3.
#pragma GCC unroll 16
  for (int j = 0; j < 4; ++j) {
    const Row a = _mm512_shuffle_f32x4(t[j], t[4 + j], 0x88), b = _mm512_shuffle_f32x4(t[j], t[4 + j], 0xdd);
    const Row c = _mm512_shuffle_f32x4(t[8 + j], t[12 + j], 0x88), d = _mm512_shuffle_f32x4(t[8 + j], t[12 + j], 0xdd);
    r[j] = _mm512_shuffle_f32x4(a, c, 0x88);
    r[8 + j] = _mm512_shuffle_f32x4(a, c, 0xdd);
    r[4 + j] = _mm512_shuffle_f32x4(b, d, 0x88);
    r[12 + j] = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
}

#elif defined(OPENBOOK_ISA_avx2)

constexpr int kSquare = 8;
using Row = __m256;
OPENBOOK_INLINE Row load_row(const float* p) { return _mm256_loadu_ps(p); }
OPENBOOK_INLINE void store_row(float* p, Row a) { _mm256_storeu_ps(p, a); }
OPENBOOK_INLINE Row zero_row() { return _mm256_setzero_ps(); }
OPENBOOK_INLINE void transpose(Row (&r)[kSquare]) {
  Row t[kSquare];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 4) {
    const Row a = _mm256_unpacklo_ps(r[i], r[i + 1]), b = _mm256_unpackhi_ps(r[i], r[i + 1]);
    const Row c = _mm256_unpacklo_ps(r[i + 2], r[i + 3]), d = _mm256_unpackhi_ps(r[i + 2], r[i + 3]);
    t[i] = _mm256_shuffle_ps(a, c, 0x44);
    t[i + 1] = _mm256_shuffle_ps(a, c, 0xee);
    t[i + 2] = _mm256_shuffle_ps(b, d, 0x44);
    t[i + 3] = _mm256_shuffle_ps(b, d, 0xee);
  }
#pragma GCC unroll 8
  for (int j = 0; j < 4; ++j) {
    r[j] = _mm256_permute2f128_ps(t[j], t[4 + j], 0x20);
    r[4 + j] = _mm256_permute2f128_ps(t[j], t[4 + j], 0x31);
  }
}

#elif defined(OPENBOOK_ISA_neon)

constexpr int kSquare = 4;
using Row = float32x4_t;
OPENBOOK_INLINE Row load_row(const float* p) { return vld1q_f32(p); }
OPENBOOK_INLINE void store_row(float* p, Row a) { vst1q_f32(p, a); }
OPENBOOK_INLINE Row zero_row() { return vdupq_n_f32(0.0f); }
OPENBOOK_INLINE void transpose(Row (&r)[kSquare]) {
  const float32x4x2_t a = vtrnq_f32(r[0], r[1]), b = vtrnq_f32(r[2], r[3]);
  r[0] = vcombine_f32(vget_low_f32(a.val[0]), vget_low_f32(b.val[0]));
  r[1] = vcombine_f32(vget_low_f32(a.val[1]), vget_low_f32(b.val[1]));
  r[2] = vcombine_f32(vget_high_f32(a.val[0]), vget_high_f32(b.val[0]));
  r[3] = vcombine_f32(vget_high_f32(a.val[1]), vget_high_f32(b.val[1]));
}

#else

constexpr int kSquare = 1;
using Row = float;
OPENBOOK_INLINE Row load_row(const float* p) { return *p; }
OPENBOOK_INLINE void store_row(float* p, Row a) { *p = a; }
OPENBOOK_INLINE Row zero_row() { return 0.0f; }
OPENBOOK_INLINE void transpose(Row (&)[kSquare]) {}

#endif

// One panel from k on: `lanes` lanes, and zeros up to `width`.
OPENBOOK_INLINE void pack_singly(const Strided& from, std::int64_t lanes, std::int64_t width, std::int64_t k,
                                 std::int64_t depth, float* to) {
  for (; k < depth; ++k) {
    for (std::int64_t lane = 0; lane < width; ++lane) {
      to[k * width + lane] = lane < lanes ? from.data[lane * from.row_stride + k * from.column_stride] : 0.0f;
    }
  }
}

// The k of a lane are neighbours in memory. The last lanes of a whole register are of no use where `width` is not a
// multiple of kSquare: the next k writes over them, so lanes go from last to first and k from first to last.
OPENBOOK_INLINE void pack_transposing(const Strided& from, std::int64_t lanes, std::int64_t width, std::int64_t depth,
                                      float* to) {
  const std::int64_t rounded = (width + kSquare - 1) / kSquare * kSquare, stride = from.row_stride;
  std::int64_t k = 0;
  for (; k + kSquare <= depth; k += kSquare) {
    for (std::int64_t lane = rounded - kSquare; lane >= 0; lane -= kSquare) {
      const float* corner = from.data + lane * stride + k;
      Row rows[kSquare];
      if (lane + kSquare <= lanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kSquare; ++i) rows[i] = load_row(corner + i * stride);
      } else {
#pragma GCC unroll 16
        for (int i = 0; i < kSquare; ++i) rows[i] = lane + i < lanes ? load_row(corner + i * stride) : zero_row();
      }
      transpose(rows);
#pragma GCC unroll 16
      for (int i = 0; i < kSquare; ++i) store_row(to + (k + i) * width + lane, rows[i]);
    }
  }
  pack_singly(from, lanes, width, k, depth, to);
}

// Panel i of `lanes` lanes that are spread evenly over panels, or fill them up.
struct Spread {
  std::int64_t lanes, num_panels, width;  // width 0: evenly

  OPENBOOK_INLINE std::int64_t begin(std::int64_t i) const { return width != 0 ? i * width : i * lanes / num_panels; }
  OPENBOOK_INLINE std::int64_t width_of(std::int64_t i) const { return begin(i + 1) - begin(i); }
};

// Lanes are neighbours in memory: a few k of all panels after another, about in the order of the memory. As above, the
// end of a register may hold what the panel's next k writes over; so the last k goes singly.
OPENBOOK_INLINE void pack_copying(const Strided& from, const Spread& spread, std::int64_t depth, float* to) {
  const std::int64_t stride = from.column_stride;
  std::int64_t whole = 0;  // panels that have no zeros
  while (whole < spread.num_panels && spread.begin(whole + 1) <= spread.lanes) ++whole;
  // What is read past the lanes lies before the end of the last k.
  std::int64_t fast = 0;
  while (fast < depth - 1 && fast * stride + kSquare <= (depth - 1) * stride) ++fast;
  constexpr std::int64_t kStep = 16;
  for (std::int64_t from_k = 0; from_k < fast; from_k += kStep) {
    const std::int64_t to_k = from_k + kStep < fast ? from_k + kStep : fast;
    for (std::int64_t i = 0; i < whole; ++i) {
      const std::int64_t begin = spread.begin(i), width = spread.width_of(i), last = (width - 1) / kSquare * kSquare;
      for (std::int64_t k = from_k; k < to_k; ++k) {
        float* row = to + begin * depth + k * width;
        const float* source = from.data + k * stride + begin;
        for (std::int64_t lane = last; lane >= 0; lane -= kSquare) store_row(row + lane, load_row(source + lane));
      }
    }
  }
  for (std::int64_t i = 0; i < spread.num_panels; ++i) {
    const std::int64_t begin = spread.begin(i), rest = spread.lanes - begin, width = spread.width_of(i);
    const std::int64_t lanes = rest < width ? rest : width;
    pack_singly(from.from(begin, 0), lanes, width, i < whole ? fast : 0, depth, to + begin * depth);
  }
}

// Rows of `from` are lanes, its columns k.
OPENBOOK_INLINE void pack_panels(const Strided& from, const Spread& spread, std::int64_t depth, float* to) {
  if (from.row_stride == 1 && from.column_stride > 1) return pack_copying(from, spread, depth, to);
  for (std::int64_t i = 0; i < spread.num_panels; ++i) {
    const std::int64_t begin = spread.begin(i), rest = spread.lanes - begin, width = spread.width_of(i);
    const std::int64_t lanes = rest < width ? rest : width;
    if (from.column_stride == 1) {
      pack_transposing(from.from(begin, 0), lanes, width, depth, to + begin * depth);
    } else {
      pack_singly(from.from(begin, 0), lanes, width, 0, depth, to + begin * depth);
    }
  }
}

}  // namespace openbook::OPENBOOK_ISA
