#include "row_kernels.h"

#include "simd.h"

namespace openbook::OPENBOOK_ISA {
namespace {

template <int Vecs>
OPENBOOK_INLINE void sum_columns(const float* x, std::int64_t rows, std::int64_t stride, float* sums) {
  Vec total[Vecs];
#pragma GCC unroll 4
  for (int v = 0; v < Vecs; ++v) total[v] = splat(0.0f);
  for (std::int64_t row = 0; row < rows; ++row) {
#pragma GCC unroll 4
    for (int v = 0; v < Vecs; ++v) total[v] = add(total[v], load(x + row * stride + v * kLanes));
  }
#pragma GCC unroll 4
  for (int v = 0; v < Vecs; ++v) store(sums + v * kLanes, total[v]);
}

void sum_rows(const float* x, std::int64_t rows, std::int64_t columns, std::int64_t stride, float* sums) {
  std::int64_t column = 0;
  for (; column + 4 * kLanes <= columns; column += 4 * kLanes) sum_columns<4>(x + column, rows, stride, sums + column);
  for (; column + kLanes <= columns; column += kLanes) sum_columns<1>(x + column, rows, stride, sums + column);
  for (; column < columns; ++column) {
    float total = 0.0f;
    for (std::int64_t row = 0; row < rows; ++row) total += x[row * stride + column];
    sums[column] = total;
  }
}

void add_rows_at(const float* x, const std::int64_t* ids, std::int64_t rows, std::int64_t columns, std::int64_t stride,
                 float* sums, std::int64_t sums_stride) {
  const std::int64_t whole = columns / kLanes * kLanes;
  for (std::int64_t row = 0; row < rows; ++row) {
    const float* from = x + row * stride;
    float* to = sums + ids[row] * sums_stride;
    for (std::int64_t i = 0; i < whole; i += kLanes) store(to + i, add(load(to + i), load(from + i)));
    for (std::int64_t i = whole; i < columns; ++i) to[i] += from[i];
  }
}

}  // namespace

extern const RowKernels row_kernels = {sum_rows, add_rows_at};

}  // namespace openbook::OPENBOOK_ISA
