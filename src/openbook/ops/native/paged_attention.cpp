#include "paged_attention.h"

#include <algorithm>
#include <cstring>

#include "paged_attention_kernels.h"
#include "scratch.h"
#include "thread_pool.h"

namespace openbook {
namespace {

// Rows of one sequence that a task takes at most: enough to read keys rarely, few enough to share a prompt out.
constexpr std::int64_t kMostRows = 32;

float* floats(Scratch use, std::int64_t size) {
  return static_cast<float*>(scratch(use, sizeof(float) * static_cast<std::size_t>(size)));
}

// Below this many keys a row is not worth three rounds of the pool.
constexpr std::int64_t kLongSequence = 512;
// Features of a head that a task mixes values for: neighbours share the lines of a cache, and the weights.
constexpr std::int64_t kMixedFeatures = 32;

// Whether one task for each row and key-value head would leave threads idle for long: rows are single, tasks few.
bool shares_out_heads(const PagedCache& cache, const PagedQueries& queries, std::int64_t num_groups) {
  if (num_groups != queries.num_rows || !is_uneven(num_groups * cache.num_kv_heads)) return false;
  std::int64_t longest = 0;
  for (std::int64_t row = 0; row < queries.num_rows; ++row) {
    const SeenPages seen = seen_pages(queries, row);
    longest = seen.end - seen.begin > longest ? seen.end - seen.begin : longest;
  }
  return longest >= kLongSequence;
}

// Scores of a row by parts of the sequence, weights by heads, values by features.
void attend_in_steps(const PagedCache& cache, const PagedQueries& queries, std::int64_t row) {
  const PagedAttentionKernels& kernels = paged_attention_kernels();
  const SeenPages seen = seen_pages(queries, row);
  const std::int64_t stride = kPageTokens * seen.num_pages, N = queries.num_heads, K = cache.num_kv_heads;
  const std::int64_t parts = (seen.num_pages + kPartPages - 1) / kPartPages;
  const std::int64_t slices = (cache.head_dim + kMixedFeatures - 1) / kMixedFeatures;
  float* scores = floats(Scratch::shared, N * stride + N);
  float* inverses = scores + N * stride;
  parallel_for(parts * K, [&](std::int64_t task) {
    const std::int64_t first = task / K * kPartPages, last = std::min(first + kPartPages, seen.num_pages);
    kernels.score(cache, queries, row, task % K, first, last, scores, stride);
  });
  parallel_for(N, [&](std::int64_t head) { inverses[head] = kernels.weigh(queries, row, head, scores + head * stride); });
  parallel_for(slices * K, [&](std::int64_t task) {
    const std::int64_t begin = task / K * kMixedFeatures, end = std::min(begin + kMixedFeatures, cache.head_dim);
    float* room = floats(Scratch::attention, kernels.scratch(cache, queries.positions[row]));
    kernels.mix(cache, queries, row, task % K, begin, end, scores, stride, inverses, room);
  });
}

}  // namespace

const std::vector<RowGroup>& group_rows(const PagedQueries& queries) {
  thread_local std::vector<RowGroup> groups;
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
  return groups;
}

bool is_uneven(std::int64_t num_tasks) {
  const std::int64_t threads = num_threads(), rounds = (num_tasks + threads - 1) / threads;
  return threads > 1 && 5 * num_tasks < 4 * rounds * threads;
}

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
  // Tasks run on other threads, which have groups of their own.
  const std::vector<RowGroup>& all = group_rows(queries);
  if (shares_out_heads(cache, queries, static_cast<std::int64_t>(all.size()))) {
    for (std::int64_t row = 0; row < queries.num_rows; ++row) attend_in_steps(cache, queries, row);
    return;
  }
  parallel_for(static_cast<std::int64_t>(all.size()) * cache.num_kv_heads, [&](std::int64_t task) {
    // From the back: the last rows of a prompt see the most.
    const RowGroup group = all[all.size() - 1 - static_cast<std::size_t>(task / cache.num_kv_heads)];
    float* room = floats(Scratch::attention, kernels.scratch(cache, queries.positions[group.end - 1]));
    kernels.attend(cache, queries, group.begin, group.end, task % cache.num_kv_heads, room);
  });
}

}  // namespace openbook
