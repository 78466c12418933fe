// Attention over a paged cache of 8-bit keys and values, for inference. The same bits everywhere, and whatever is computed
// with a row: chunks, batch, order, threads.
//
// The specification. "Rounded" is by the rules of quant.h, x = d * q with whole numbers q from -127 to 127, but for the
// scales d = max |x| / 127, which stay float32. Features of a head and positions of a sequence are cut into blocks of 32.
//   A key and a query are rounded block by block of features, a value as a whole.
//   score[s] = (over blocks of features ascending: acc = fma(float(sum of q_q * q_k), d_k * d_q, acc), from +0) * scale
//   m, e[s], denominator and inverse as in attention.h: the maximum, exponentials, 16 lanes by position, one quotient.
//   u[s] = e[s] * d_v[s], and 0 for positions that the row does not see; rounded block by block of positions
//   out[d] = (over blocks of positions ascending: acc = fma(float(sum of q_u * q_v), d_u, acc), from +0) * inverse + 0.0f
// An infinity or NaN in a key makes the scores NaN that it goes into, one in a value the block of positions that sees it.
//
// Shapes: M rows, N query heads, K key-value heads, H features of a head, a multiple of 32.
#pragma once

#include <cstdint>

#include "paged_attention.h"

namespace openbook {

// The cache of one layer. A page is 16 tokens of one head:
//   scales of keys, float32 [H / 32, 16]; scales of values, float32 [16];
//   keys in vectors of 16 tokens by 4 features, [H / 4, 16, 4]; values of 16 features by 4 tokens, [4, H / 16, 16, 4].
// Keys and values are kept as q + 128.
struct QuantCache {
  std::uint8_t* pages;  // [pages, K, quant_page_bytes(H)], 64-byte aligned
  std::int64_t num_kv_heads, head_dim;
  const std::int32_t* block_tables;  // [sequences, table_width]: the pages of each sequence in order
  std::int64_t table_width;
};

constexpr std::int64_t quant_page_bytes(std::int64_t head_dim) { return 2 * head_dim + 64 + 32 * head_dim; }

// Puts the key and the value [K, H] of a token into its page. Different tokens may be written at the same time.
void write_quant_kv(const QuantCache& cache, std::int64_t sequence, std::int64_t position, const float* key,
                    const float* value);

// Splits the work over the thread pool. Rows of a sequence that stand together in ascending order share what they read.
void quant_paged_attention(const QuantCache& cache, const PagedQueries& queries);

}  // namespace openbook
