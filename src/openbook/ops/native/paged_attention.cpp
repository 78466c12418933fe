#include "paged_attention.h"

#include <cstring>
#include <vector>

#include "paged_attention_kernels.h"
#include "scratch.h"
#include "thread_pool.h"

namespace openbook {
namespace {

// Rows of one sequence that a task takes at most: enough to read keys rarely, few enough to share a prompt out.
constexpr std::int64_t kMostRows = 32;

struct RowGroup {
  std::int64_t begin, end;
};

void group_rows(const PagedQueries& queries, std::vector<RowGroup>& groups) {
  groups.clear();
  for (std::int64_t row = 0; row < queries.num_rows; ++row) {
    const bool goes_on = !groups.empty() && row - groups.back().begin < kMostRows &&
                         queries.sequences[row] == queries.sequences[row - 1] &&
                         queries.positions[row] >= queries.positions[row - 1];
    if (goes_on) {
      groups.back().end = row + 1;
    } else {
      groups.push_back({row, row + 1});
    }
  }
}

}  // namespace

void write_kv(const PagedCache& cache, std::int64_t sequence, std::int64_t position, const float* key,
              const float* value) {
  const std::int64_t H = cache.head_dim, lane = position % kPageTokens;
  const std::int64_t page = cache.block_tables[sequence * cache.table_width + position / kPageTokens];
  for (std::int64_t head = 0; head < cache.num_kv_heads; ++head) {
    const std::int64_t at = (page * cache.num_kv_heads + head) * H * kPageTokens;
    for (std::int64_t d = 0; d < H; ++d) cache.keys[at + d * kPageTokens + lane] = key[head * H + d];
    std::memcpy(cache.values + at + lane * H, value + head * H, sizeof(float) * static_cast<std::size_t>(H));
  }
}

void paged_attention(const PagedCache& cache, const PagedQueries& queries) {
  const PagedAttentionKernels& kernels = paged_attention_kernels();
  thread_local std::vector<RowGroup> groups;
  group_rows(queries, groups);
  // Tasks run on other threads, which have groups of their own.
  const std::vector<RowGroup>& all = groups;
  parallel_for(static_cast<std::int64_t>(all.size()) * cache.num_kv_heads, [&](std::int64_t task) {
    // From the back: the last rows of a prompt see the most.
    const RowGroup group = all[all.size() - 1 - static_cast<std::size_t>(task / cache.num_kv_heads)];
    const std::int64_t size = kernels.scratch(cache, queries.positions[group.end - 1]);
    void* room = scratch(Scratch::attention, sizeof(float) * static_cast<std::size_t>(size));
    kernels.attend(cache, queries, group.begin, group.end, task % cache.num_kv_heads, static_cast<float*>(room));
  });
}

}  // namespace openbook
