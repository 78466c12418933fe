#include "row_kernels.h"

#include "simd.h"

namespace openbook::OPENBOOK_ISA {
namespace {

// Adds `rows` rows to sums, one after another.
template <int Vecs>
OPENBOOK_INLINE void add_rows(const float* x, std::int64_t rows, std::int64_t stride, float* sums) {
  Vec total[Vecs];
#pragma GCC unroll 4
  for (int v = 0; v < Vecs; ++v) total[v] = load(sums + v * kLanes);
  for (std::int64_t row = 0; row < rows; ++row) {
#pragma GCC unroll 4
    for (int v = 0; v < Vecs; ++v) total[v] = add(total[v], load(x + row * stride + v * kLanes));
  }
#pragma GCC unroll 4
  for (int v = 0; v < Vecs; ++v) store(sums + v * kLanes, total[v]);
}

void sum_rows(const float* x, std::int64_t rows, std::int64_t columns, std::int64_t stride, float* sums) {
  for (std::int64_t column = 0; column < columns; ++column) sums[column] = 0.0f;
  // A few rows at a time, so that memory is read about in its order.
  constexpr std::int64_t kRows = 8;
  for (std::int64_t row = 0; row < rows; row += kRows) {
    const std::int64_t count = rows - row < kRows ? rows - row : kRows;
    const float* from = x + row * stride;
    std::int64_t column = 0;
    for (; column + 4 * kLanes <= columns; column += 4 * kLanes) {
      add_rows<4>(from + column, count, stride, sums + column);
    }
    for (; column + kLanes <= columns; column += kLanes) add_rows<1>(from + column, count, stride, sums + column);
    for (; column < columns; ++column) {
      for (std::int64_t i = 0; i < count; ++i) sums[column] += from[i * stride + column];
    }
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
