// The pieces of a matrix product C[M, N] = A[M, K] B[K, N] in float32, and of one with a matrix packed beforehand.
//
// Which bits: c[m, n] = fma(a[m, k], b[k, n], acc) for k ascending, acc from +0, or from c[m, n] where one accumulates;
// then + bias[n] as one add, if there is a bias. How the product is cut into pieces shows in no bit: pieces split outputs,
// and between two pieces of k the accumulator lies in C, unrounded.
//
// B is packed into panels of 32 columns, k innermost but for the columns: element (k, n) of a panel is at 32 k + n, columns
// past N hold zero. A is packed into panels of r rows, r at most `tile_rows`: element (m, k) is at r k + m.
#pragma once

#include <cstdint>

#include "dispatch.h"

namespace openbook {

// What a packed B holds. Both 16-bit formats widen to float32 exactly.
enum class Element { f32, bf16, f16 };

constexpr std::int64_t kPanelColumns = 32;

// Rows of A are spread evenly over as few panels as hold them: panel i has the rows from i * rows / panels on.
inline std::int64_t num_row_panels(std::int64_t rows, std::int64_t tile_rows) { return (rows + tile_rows - 1) / tile_rows; }

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

struct GemmKernels {
  std::int64_t tile_rows;
  // One panel: element (lane, k) at from[lane * lane_stride + k * k_stride] to to[width * k + lane], zero for lanes from
  // `lanes` to `width`. May write 16 floats past the panel's end.
  void (*pack)(const float* from, std::int64_t lane_stride, std::int64_t k_stride, std::int64_t lanes, std::int64_t width,
               std::int64_t depth, float* to);
  void (*multiply)(const GemmBlock& block);
};

OPENBOOK_KERNELS(GemmKernels, gemm_kernels)

}  // namespace openbook
