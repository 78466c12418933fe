// The exact matrix product, and linear layers over weights packed beforehand. gemm_kernels.h says which bits they give.
#pragma once

#include <cstddef>
#include <cstdint>

#include "gemm_kernels.h"

namespace openbook {

// c [m, n] = a [m, k] b [k, n], plus what c holds if `accumulate`, plus bias [n] unless it is null. Rows of c are
// c_stride elements apart and must not overlap the inputs. Split over the thread pool; in one of its tasks, run there.
// Throws std::bad_alloc where there is no memory for packed panels.
void gemm(std::int64_t m, std::int64_t n, std::int64_t k, Strided a, Strided b, float* c, std::int64_t c_stride,
          bool accumulate = false, const float* bias = nullptr);

// The same on the calling thread alone.
void gemm_serial(std::int64_t m, std::int64_t n, std::int64_t k, Strided a, Strided b, float* c, std::int64_t c_stride,
                 bool accumulate = false, const float* bias = nullptr);

// A matrix [n, k] as one use of it reads it: outputs in panels (gemm_kernels.h). Every instruction set has this layout.
// Does not own its memory.
struct PackedWeight {
  const void* data;  // [num_panels, k, 16] elements, rows past n zero; aligned to 64 bytes
  std::int64_t n;    // outputs
  std::int64_t k;    // inputs
  Element element;

  std::int64_t num_panels() const { return (n + kPanelColumns - 1) / kPanelColumns; }
};

std::size_t packed_bytes(std::int64_t n, std::int64_t k, Element element);

// Packs weight [n, k], row-major, of `element`s (16-bit ones as they lie in memory) into the packed_bytes(...) at `to`.
void pack_weight(const void* weight, std::int64_t n, std::int64_t k, Element element, void* to);

// Row `row` of the matrix, widened: out [k].
void packed_row(const PackedWeight& weight, std::int64_t row, float* out);

// out [m, n] = x [m, k] weight^T, plus bias [n] unless it is null; rows of x are x_stride apart, of out out_stride.
// Split over the thread pool. The same bits as `gemm` with the weight widened to float32.
void packed_linear(const PackedWeight& weight, const float* x, std::int64_t x_stride, std::int64_t m, const float* bias,
                   float* out, std::int64_t out_stride);

// The columns of panels begin to before end, on the calling thread; out and bias begin at column 0 all the same.
void packed_linear_range(const PackedWeight& weight, std::int64_t begin, std::int64_t end, const float* x,
                         std::int64_t x_stride, std::int64_t m, const float* bias, float* out, std::int64_t out_stride);

}  // namespace openbook
