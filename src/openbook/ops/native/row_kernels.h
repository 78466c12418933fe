// Rows added up in the order they stand in: the gradients of a bias and of an embedding.
#pragma once

#include <cstdint>

#include "dispatch.h"

namespace openbook {

struct RowKernels {
  // sums[n] = x[0, n] + x[1, n] + ..., from +0; x [rows, columns], its rows `stride` elements apart.
  void (*sum_rows)(const float* x, std::int64_t rows, std::int64_t columns, std::int64_t stride, float* sums);
  // sums[ids[i], n] += x[i, n] for i ascending; sums has rows `sums_stride` apart, x `stride` apart.
  void (*add_rows_at)(const float* x, const std::int64_t* ids, std::int64_t rows, std::int64_t columns,
                      std::int64_t stride, float* sums, std::int64_t sums_stride);
};

OPENBOOK_KERNELS(RowKernels, row_kernels)

}  // namespace openbook
