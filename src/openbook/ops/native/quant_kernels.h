// The kernels behind quant.h, which says what they compute.
#pragma once

#include <cstdint>

#include "dispatch.h"
#include "quant.h"

namespace openbook {

struct QuantKernels {
  void (*quantize_row)(const float* x, std::int64_t num_blocks, QuantBlock* out);

  // Rows x[0 .. num_rows), each num_blocks long, by panels [begin, end).
  void (*linear)(const QuantView& w, const QuantBlock* x, std::int64_t num_rows, const float* bias, float* out,
                 std::int64_t stride, std::int64_t begin, std::int64_t end);

  void (*dequantize_row)(const QuantView& w, std::int64_t row, float* out);
};

OPENBOOK_DOT_KERNELS(QuantKernels, quant_kernels)

}  // namespace openbook
