// The pieces of a matrix product C[M, N] = A[M, K] B[K, N] in float32, and of one with a matrix packed beforehand.
//
// Which bits: c[m, n] = fma(a[m, k], b[k, n], acc) for k ascending, acc from +0, or from c[m, n] where one accumulates;
// then + bias[n] as one add, if there is a bias. How the product is cut into pieces shows in no bit: pieces split
// outputs, and between two pieces of k the accumulator lies in C, unrounded.
//
// B is packed into panels of 16 columns, one behind another: element (k, n) of a panel is at 16 k + n, columns past N
// hold zero. A is packed into panels of r rows, r at most `tile_rows`: element (m, k) of a panel is at r k + m.
#pragma once

#include <cstdint>

#include "dispatch.h"

namespace openbook {

// What a packed B holds. Both 16-bit formats widen to float32 exactly.
enum class Element { f32, bf16, f16 };

constexpr std::int64_t kPanelColumns = 16;

// Rows of A are spread evenly over as few panels as hold them: panel i has the rows from i * rows / panels on.
inline std::int64_t num_row_panels(std::int64_t rows, std::int64_t tile_rows) {
  return (rows + tile_rows - 1) / tile_rows;
}

struct GemmBlock {
  const float* a;             // panels of all rows, one behind another
  std::int64_t rows;
  const void* b;              // first panel
  Element element;            // of b
  std::int64_t panel_stride;  // elements of b from one panel to the next
  std::int64_t columns;
  std::int64_t depth;         // how many k
  float* c;                   // [rows, columns]
  std::int64_t c_stride;      // elements from one row to the next
  bool accumulate;            // start from c, not from +0
  const float* bias;          // [columns], or null
};

// A matrix in memory: element (i, j) is at data[i * row_stride + j * column_stride].
struct Strided {
  const float* data;
  std::int64_t row_stride;
  std::int64_t column_stride;

  Strided from(std::int64_t i, std::int64_t j) const {
    return {data + i * row_stride + j * column_stride, row_stride, column_stride};
  }
};

struct GemmKernels {
  std::int64_t tile_rows;
  // Panels of all `rows` of a, each `depth` deep. May write 16 floats past them.
  void (*pack_a)(const Strided& a, std::int64_t rows, std::int64_t depth, float* to);
  // Panels of all `columns` of b, each `depth` deep.
  void (*pack_b)(const Strided& b, std::int64_t columns, std::int64_t depth, float* to);
  void (*multiply)(const GemmBlock& block);
};

OPENBOOK_KERNELS(GemmKernels, gemm_kernels)

}  // namespace openbook
