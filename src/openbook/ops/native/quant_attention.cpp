#include "quant_attention.h"

#include "quant_attention_kernels.h"
#include "scratch.h"
#include "thread_pool.h"

namespace openbook {

void write_quant_kv(const QuantCache& cache, std::int64_t sequence, std::int64_t position, const float* key,
                    const float* value) {
  quant_attention_kernels().write(cache, sequence, position, key, value);
}

void quant_paged_attention(const QuantCache& cache, const PagedQueries& queries) {
  const QuantAttentionKernels& kernels = quant_attention_kernels();
  const std::vector<RowGroup>& all = group_rows(queries);
  const auto num_groups = static_cast<std::int64_t>(all.size());
  const std::int64_t K = cache.num_kv_heads, heads = queries.num_heads / K;
  // Single rows with few heads of keys are shared out by heads of queries, which read the same pages then.
  const std::int64_t parts = num_groups == queries.num_rows && is_uneven(num_groups * K) ? heads : 1;
  parallel_for(num_groups * K * parts, [&](std::int64_t task) {
    // From the back: the last rows of a prompt see the most.
    const RowGroup group = all[static_cast<std::size_t>(num_groups - 1 - task / (K * parts))];
    const std::int64_t pairs = (group.end - group.begin) * heads, part = task % parts;
    const std::int64_t bytes = kernels.scratch_bytes(cache, queries.positions[group.end - 1]);
    kernels.attend(cache, queries, group.begin, group.end, task / parts % K, pairs * part / parts,
                   pairs * (part + 1) / parts, scratch(Scratch::attention, static_cast<std::size_t>(bytes)));
  });
}

}  // namespace openbook
