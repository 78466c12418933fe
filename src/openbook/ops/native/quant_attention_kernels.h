// The kernels behind quant_attention.h, which says what they compute.
#pragma once

#include <cstdint>

#include "dispatch.h"
#include "quant_attention.h"

namespace openbook {

struct QuantAttentionKernels {
  void (*write)(const QuantCache& cache, std::int64_t sequence, std::int64_t position, const float* key,
                const float* value);

  // Bytes that `attend` may use as scratch, aligned to 64, for rows up to this position.
  std::int64_t (*scratch_bytes)(const QuantCache& cache, std::int64_t last_position);

  // The query rows from `begin` to before `end`, all of one sequence, positions not descending, and their heads that
  // share kv_head: of these (end - begin) * N / K pairs, row by row, those from `first` to before `last`.
  void (*attend)(const QuantCache& cache, const PagedQueries& queries, std::int64_t begin, std::int64_t end,
                 std::int64_t kv_head, std::int64_t first, std::int64_t last, void* scratch);
};

OPENBOOK_DOT_KERNELS(QuantAttentionKernels, quant_attention_kernels)

}  // namespace openbook
