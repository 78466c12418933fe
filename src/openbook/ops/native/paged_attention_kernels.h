// The parts that paged attention is split into: neighbouring rows of one sequence and one key-value head.
#pragma once

#include <cstdint>

#include "dispatch.h"
#include "paged_attention.h"

namespace openbook {

constexpr std::int64_t kPartPages = 16;

struct PagedAttentionKernels {
  // Floats that `attend` may use as scratch for rows up to this position.
  std::int64_t (*scratch)(const PagedCache& cache, std::int64_t last_position);
  // The rows from `begin` to before `end`, all of one sequence, positions not descending; scratch aligned to 64 bytes.
  void (*attend)(const PagedCache& cache, const PagedQueries& queries, std::int64_t begin, std::int64_t end,
                 std::int64_t kv_head, float* scratch);

  // The same in three steps, of which each can be shared out further: for a row of few heads over a long sequence.
  // Scores of the heads of kv_head against pages from `first` to before `last` of those that the row sees, at most
  // kPartPages; to scores [N, stride], from the first key of the first page on that the row sees.
  void (*score)(const PagedCache& cache, const PagedQueries& queries, std::int64_t row, std::int64_t kv_head,
                std::int64_t first, std::int64_t last, float* scores, std::int64_t stride);
  // Scores of a head to exp(score - m); returns 1 / denominator.
  float (*weigh)(const PagedQueries& queries, std::int64_t row, std::int64_t head, float* scores);
  // Features from `begin` (a multiple of 16) to before `end` of the result for the heads of kv_head.
  void (*mix)(const PagedCache& cache, const PagedQueries& queries, std::int64_t row, std::int64_t kv_head,
              std::int64_t begin, std::int64_t end, const float* weights, std::int64_t stride, const float* inverses,
              float* scratch);
};

// Pages that a row sees: from first_page on.
struct SeenPages {
  std::int64_t first_page, num_pages;
  std::int64_t begin, end;  // of the keys, counted from the first of first_page
};

inline SeenPages seen_pages(const PagedQueries& queries, std::int64_t row) {
  const std::int64_t position = queries.positions[row];
  const std::int64_t begin = queries.window != 0 && position >= queries.window ? position - queries.window + 1 : 0;
  const std::int64_t first_page = begin / kPageTokens, base = first_page * kPageTokens;
  return {first_page, position / kPageTokens + 1 - first_page, begin - base, position + 1 - base};
}

OPENBOOK_KERNELS(PagedAttentionKernels, paged_attention_kernels)

}  // namespace openbook
