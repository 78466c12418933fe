// Attention over a paged cache of keys and values, for inference: the bits of attention.h, whatever is computed with a row.
//
// A row is a token of a sequence. It sees its own sequence at the positions max(0, p - window + 1) to p, which must have
// been written, and nothing else: other pages, and what lies behind in its own, may hold anything.
//
// Shapes: M rows, N query heads, K key-value heads, H features of a head.
#pragma once

#include <cstdint>
#include <vector>

namespace openbook {

// Tokens of a page.
constexpr std::int64_t kPageTokens = 16;

// The cache of one layer.
struct PagedCache {
  float* keys;                       // [pages, K, H, kPageTokens]
  float* values;                     // [pages, K, kPageTokens, H]
  std::int64_t num_kv_heads, head_dim;
  const std::int32_t* block_tables;  // [sequences, table_width]: the pages of each sequence in order
  std::int64_t table_width;
};

struct PagedQueries {
  std::int64_t num_rows;          // M
  const std::int32_t* sequences;  // [M], rows of block_tables
  const std::int32_t* positions;  // [M]
  const float* q;                 // [M, N, H], q_stride floats from row to row
  std::int64_t q_stride;
  std::int64_t num_heads;         // N
  float scale;
  std::int64_t window;            // latest tokens that a row sees, its own included; 0: all
  const float* sinks;             // [N] or null
  float* out;                     // [M, N, H]
};

// Puts the key and the value [K, H] of a token into its page. Different tokens may be written at the same time.
void write_kv(const PagedCache& cache, std::int64_t sequence, std::int64_t position, const float* key,
              const float* value);

// Neighbouring rows of one sequence in ascending order, which share what they read of it.
struct RowGroup {
  std::int64_t begin, end;
};

// All rows in groups, in order; valid until the calling thread's next call.
const std::vector<RowGroup>& group_rows(const PagedQueries& queries);

// Whether so many tasks leave threads idle for long while the others finish.
bool is_uneven(std::int64_t num_tasks);

// Splits the work over the thread pool. Rows of a sequence that stand together in ascending order share what they read.
void paged_attention(const PagedCache& cache, const PagedQueries& queries);

}  // namespace openbook
