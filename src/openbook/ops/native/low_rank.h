// Low-rank updates of a matrix: what an adapter adds to a product (LoRA, arXiv 2106.09685, section 4.1).
//
// Which bits, for each row of x: low[j] = fma(a[j, k], x[k], acc) for k ascending, acc from +0; high[i] = fma(b[i, j],
// low[j], acc) for j ascending, acc from +0; then out[first_row + i] + high[i] as one add. x is what the product had as
// floats, before it was rounded to int8 where the matrix is quantised.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "gemm.h"

namespace openbook {

// Row-major, [rows, columns].
struct FloatMatrix {
  const float* data;
  std::int64_t rows, columns;
};

// What is added to some outputs of a matrix, from first_row on: b (a x), with a [rank, inputs] and b [outputs, rank].
struct LowRankUpdate {
  std::int64_t first_row;
  FloatMatrix a, b;
};

// Memory for products of a few rows; grows to the largest so far.
struct LowRankScratch {
  std::vector<float> low, high;
};

// All that one adapter adds to one matrix.
class LowRank {
 public:
  // Copies the matrices, which fit each other. The updates' outputs do not overlap.
  explicit LowRank(const std::vector<LowRankUpdate>& updates);

  // Adds to rows of out, out_stride apart, what the rows of x [num_rows, inputs] make.
  void add_to(const float* x, std::int64_t num_rows, float* out, std::int64_t out_stride, LowRankScratch& scratch) const;

 private:
  struct Part {
    std::int64_t first_row, first_low;
    PackedWeight b;
  };

  PackedWeight pack(const FloatMatrix& matrix);

  std::vector<std::shared_ptr<void>> memory_;
  PackedWeight a_;  // of all updates, one below another: x is read once
  std::vector<Part> parts_;
};

}  // namespace openbook
