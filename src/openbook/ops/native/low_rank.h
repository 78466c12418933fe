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

// What the rows of some x are taken through; grows to the largest so far.
struct LowRankScratch {
  std::vector<float> low, high;
};

class LowRank {
 public:
  // Copies a [rank, inputs] and b [outputs, rank], row-major. Updates the outputs from first_row on.
  LowRank(std::int64_t first_row, const float* a, const float* b, std::int64_t rank, std::int64_t inputs,
          std::int64_t outputs);

  std::int64_t first_row() const { return first_row_; }
  std::int64_t outputs() const { return b_.n; }

  // Adds to rows of out, out_stride apart, what the rows of x [num_rows, inputs] make.
  void add_to(const float* x, std::int64_t num_rows, float* out, std::int64_t out_stride, LowRankScratch& scratch) const;

 private:
  std::int64_t first_row_;
  std::shared_ptr<void> memory_;  // of both matrices
  PackedWeight a_, b_;
};

}  // namespace openbook
