// The parts that paged attention is split into: neighbouring rows of one sequence and one key-value head.
#pragma once

#include <cstdint>

#include "dispatch.h"
#include "paged_attention.h"

namespace openbook {

struct PagedAttentionKernels {
  // Floats that `attend` may use as scratch for rows up to this position.
  std::int64_t (*scratch)(const PagedCache& cache, std::int64_t last_position);
  // The rows from `begin` to before `end`, all of one sequence, positions not descending; scratch aligned to 64 bytes.
  void (*attend)(const PagedCache& cache, const PagedQueries& queries, std::int64_t begin, std::int64_t end,
                 std::int64_t kv_head, float* scratch);
};

OPENBOOK_KERNELS(PagedAttentionKernels, paged_attention_kernels)

}  // namespace openbook
