#include "quant_attention_kernels.h"

#include "attention_tiles.h"
#include "paged_attention_kernels.h"
#include "quant_dot.h"
#include "quant_rows.h"

namespace openbook::OPENBOOK_ISA {
namespace {

static_assert(kPageTokens == kLanes && kQuantBlock == 2 * kPageTokens);
constexpr int kVectorBytes = 4 * kLanes;  // 16 lanes of 4 codes

// Where the parts of a page lie, in bytes from its start.
struct PageLayout {
  Size value_scales, keys, values;

  explicit PageLayout(Size H) : value_scales(2 * H), keys(value_scales + kVectorBytes), values(keys + kLanes * H) {}
};

float* floats_at(std::uint8_t* page, Size at) { return reinterpret_cast<float*>(page + at); }
const float* floats_at(const std::uint8_t* page, Size at) { return reinterpret_cast<const float*>(page + at); }

void write(const QuantCache& cache, Size sequence, Size position, const float* key, const float* value) {
  const Size H = cache.head_dim, K = cache.num_kv_heads, lane = position % kLanes;
  const PageLayout layout(H);
  const Size page = cache.block_tables[sequence * cache.table_width + position / kLanes];
  for (Size head = 0; head < K; ++head, key += H, value += H) {
    std::uint8_t* const to = cache.pages + (page * K + head) * quant_page_bytes(H);
    for (Size block = 0; block < H / kQuantBlock; ++block) {
      std::int8_t codes[kQuantBlock];
      floats_at(to, kVectorBytes * block)[lane] = round_block(key + kQuantBlock * block, codes).scale;
      std::uint8_t* const keys = to + layout.keys + kQuantBlock * kLanes * block + 4 * lane;
      for (Size d = 0; d < kQuantBlock; ++d) {
        keys[d / 4 * kVectorBytes + d % 4] = static_cast<std::uint8_t>(codes[d] + 128);
      }
    }
    const BlockScale whole = scale_of(value, H);
    floats_at(to, layout.value_scales)[lane] = whole.scale;
    std::uint8_t* const values = to + layout.values + lane / 4 * (H / kLanes) * kVectorBytes + lane % 4;
    for (Size first = 0; first < H; first += kQuantBlock) {
      std::int8_t codes[kQuantBlock] = {};
      if (whole.is_finite) round_codes(value + first, whole.inverse, codes);
      for (Size d = 0; d < kQuantBlock; ++d) values[4 * (first + d)] = static_cast<std::uint8_t>(codes[d] + 128);
    }
  }
}

// What a tile of rows works with. Positions count from the first of `pages`, pages come in pairs.
struct Tile {
  const std::uint8_t* const* pages;
  Size head_dim;
  const QuantBlock* rows;  // [rows, blocks of `stride`]: queries, later weights
  Size stride;
};

// Adds to sums what 8 vectors of codes, `step` bytes apart, give with a block of each row.
template <int R>
OPENBOOK_INLINE void add_products(const std::uint8_t* const (&codes)[kProductVecs], const Size (&steps)[8],
                                  const QuantBlock* rows, Size stride, Ints (&sums)[R][kProductVecs]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kProductVecs; ++v) sums[r][v] = kHasOffset ? splat_int(&rows[r * stride].start_q8) : zero_ints();
  }
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) {
    Codes8 four[kProductVecs];
#pragma GCC unroll 2
    for (int v = 0; v < kProductVecs; ++v) four[v] = load_codes8(codes[v] + steps[j]);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Fours x = splat_four(rows[r * stride].codes + 4 * j);
#pragma GCC unroll 2
      for (int v = 0; v < kProductVecs; ++v) sums[r][v] = dot(sums[r][v], four[v], x);
    }
  }
}

constexpr bool waits_for_memory(int rows) { return rows <= 3; }

// Scores of R rows against the pages from `begin` to before `end`, both even.
template <int R>
void score(const Tile& tile, Size begin, Size end, float scale, float* scores, Size scores_stride) {
  const PageLayout layout(tile.head_dim);
  for (Size page = begin; page < end; page += kProductVecs) {
    Vec acc[R][kProductVecs];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < kProductVecs; ++v) acc[r][v] = splat(0.0f);
    }
    if constexpr (waits_for_memory(R)) {  // the values that go with these keys, and the keys of the next pages
      for (int v = 0; v < kProductVecs; ++v) {
        const std::uint8_t* const here = tile.pages[page + v];
        const std::uint8_t* const next = tile.pages[page + kProductVecs + v < end ? page + kProductVecs + v : page + v];
        for (Size at = 0; at < kLanes * tile.head_dim; at += kVectorBytes) {
          __builtin_prefetch(here + layout.values + at, 0, 2);
          __builtin_prefetch(next + layout.keys + at, 0, 2);
        }
      }
    }
    for (Size block = 0; block < tile.head_dim / kQuantBlock; ++block) {
      const std::uint8_t* codes[kProductVecs];
      for (int v = 0; v < kProductVecs; ++v) {
        codes[v] = tile.pages[page + v] + layout.keys + kQuantBlock * kLanes * block;
      }
      constexpr Size kSteps[8] = {0, 64, 128, 192, 256, 320, 384, 448};
      Ints sums[R][kProductVecs];
      add_products<R>(codes, kSteps, tile.rows + block, tile.stride, sums);
#pragma GCC unroll 2
      for (int v = 0; v < kProductVecs; ++v) {
        const Vec key_scale = load(floats_at(tile.pages[page + v], kVectorBytes * block));
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const Vec query_scale = splat(tile.rows[r * tile.stride + block].scale);
          acc[r][v] = fma(to_floats(sums[r][v]), mul(key_scale, query_scale), acc[r][v]);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < kProductVecs; ++v) {
        store(scores + r * scores_stride + kLanes * (page + v), mul(acc[r][v], splat(scale)));
      }
    }
  }
}

// sums[r] [head_dim] of R rows over the blocks of positions from `begin` to before `end`.
template <int R>
void mix(const Tile& tile, Size begin, Size end, float* sums_out) {
  const PageLayout layout(tile.head_dim);
  const Size step = tile.head_dim / kLanes * kVectorBytes;
  for (Size first = 0; first < tile.head_dim / kLanes; first += kProductVecs) {
    Vec acc[R][kProductVecs];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < kProductVecs; ++v) acc[r][v] = splat(0.0f);
    }
    for (Size block = begin; block < end; ++block) {
      const std::uint8_t* const page = tile.pages[2 * block];
      const Size other = tile.pages[2 * block + 1] - page;  // the second half of the block, from the first
      const Size steps[8] = {0, step, 2 * step, 3 * step, other, other + step, other + 2 * step, other + 3 * step};
      const std::uint8_t* codes[kProductVecs];
      for (int v = 0; v < kProductVecs; ++v) codes[v] = page + layout.values + kVectorBytes * (first + v);
      Ints sums[R][kProductVecs];
      add_products<R>(codes, steps, tile.rows + block, tile.stride, sums);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Vec scale = splat(tile.rows[r * tile.stride + block].scale);
#pragma GCC unroll 2
        for (int v = 0; v < kProductVecs; ++v) acc[r][v] = fma(to_floats(sums[r][v]), scale, acc[r][v]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < kProductVecs; ++v) store(sums_out + r * tile.head_dim + kLanes * (first + v), acc[r][v]);
    }
  }
}

// Calls body(Rows<count>), count from 1 to kTileRows of the products.
template <int R = kProductRows, typename Body>
OPENBOOK_INLINE void with_product_rows(int count, Body body) {
  if constexpr (R > 1) {
    if (count < R) return with_product_rows<R - 1>(count, body);
  }
  body(Rows<R>{});
}

void quantize(const float* x, Size num_blocks, QuantBlock* out) {
  for (Size block = 0; block < num_blocks; ++block) {
    const RoundedBlock rounded = round_block(x + kQuantBlock * block, out[block].codes);
    out[block].scale = rounded.scale;
    out[block].start_q8 = -128 * rounded.sum;
  }
}

// Exponentials of a row, times the scales of the values, rounded; blocks from `begin` to before `end`.
void weigh(const float* exponentials, const std::uint8_t* const* pages, Size at, Size from, Size to, Size begin, Size end,
           QuantBlock* out) {
  for (Size block = begin; block < end; ++block) {
    alignas(64) float weights[kQuantBlock];
    for (Size half = 0; half < 2; ++half) {
      const Size first = kQuantBlock * block + kLanes * half;
      Vec weight = splat(0.0f);
      if (first < to && first + kLanes > from) {
        const Vec scale = load(floats_at(pages[2 * block + half], at));
        weight = keep_range(mul(load(exponentials + first), scale), first, from, to, 0.0f);
      }
      store(weights + kLanes * half, weight);
    }
    quantize(weights, 1, out + block);
  }
}

Size whole_lines(Size bytes) { return (bytes + 63) / 64 * 64; }

struct Places {  // of the parts of the scratch, in bytes
  Size pages, queries, weights, sums, scores, end;

  Places(Size head_dim, Size num_pages)
      : pages(0),
        queries(whole_lines(num_pages * static_cast<Size>(sizeof(void*)))),
        weights(queries + whole_lines(kProductRows * head_dim / kQuantBlock * static_cast<Size>(sizeof(QuantBlock)))),
        sums(weights + whole_lines(kProductRows * num_pages / 2 * static_cast<Size>(sizeof(QuantBlock)))),
        scores(sums + 4 * kProductRows * head_dim),
        end(scores + 4 * kProductRows * kLanes * num_pages) {}
};

Size scratch_bytes(const QuantCache& cache, Size last_position) {
  return Places(cache.head_dim, 2 * (last_position / kQuantBlock + 1)).end;
}

void attend(const QuantCache& cache, const PagedQueries& queries, Size begin, Size end, Size kv_head, Size first,
            Size last, void* scratch) {
  const Size H = cache.head_dim, K = cache.num_kv_heads, group = queries.num_heads / K, num_blocks = H / kQuantBlock;
  const PageLayout layout(H);
  const Size seen_from = seen_pages(queries, begin).first_page, first_page = seen_from / 2 * 2;
  const Size last_page = queries.positions[end - 1] / kLanes, num_pages = (last_page / 2 + 1) * 2 - first_page;
  const Places places(H, num_pages);
  auto* const room = static_cast<std::uint8_t*>(scratch);
  auto* const pages = reinterpret_cast<const std::uint8_t**>(room + places.pages);
  auto* const rounded = reinterpret_cast<QuantBlock*>(room + places.queries);
  auto* const weights = reinterpret_cast<QuantBlock*>(room + places.weights);
  float* const sums = floats_at(room, places.sums);
  float* const scores = floats_at(room, places.scores);
  const Size stride = kLanes * num_pages, base = kLanes * first_page;
  const std::int32_t* const table = cache.block_tables + queries.sequences[begin] * cache.table_width;
  for (Size page = 0; page < num_pages; ++page) {
    // Halves of a block that no row sees may not be there: what stands in for them is multiplied by zeros.
    Size at = first_page + page;
    at = at < seen_from ? seen_from : at > last_page ? last_page : at;
    pages[page] = cache.pages + (table[at] * K + kv_head) * quant_page_bytes(H);
  }
  for (Size at = first; at < last; at += kProductRows) {
    const int count = static_cast<int>(last - at < kProductRows ? last - at : kProductRows);
    Size from[kProductRows], to[kProductRows];
    float inverses[kProductRows];
    for (int r = 0; r < count; ++r) {
      const Size row = begin + (at + r) / group, head = kv_head * group + (at + r) % group;
      const SeenPages seen = seen_pages(queries, row);
      from[r] = kLanes * seen.first_page + seen.begin - base;
      to[r] = kLanes * seen.first_page + seen.end - base;
      quantize(queries.q + row * queries.q_stride + head * H, num_blocks, rounded + r * num_blocks);
    }
    const Size begin_block = from[0] / kQuantBlock, end_block = (to[count - 1] + kQuantBlock - 1) / kQuantBlock;
    with_product_rows(count, [&](auto tile) {
      constexpr int R = decltype(tile)::count;
      score<R>({pages, H, rounded, num_blocks}, 2 * begin_block, 2 * end_block, queries.scale, scores, stride);
    });
    for (int r = 0; r < count; ++r) {
      const Size head = kv_head * group + (at + r) % group;
      const float* const sink = queries.sinks != nullptr ? queries.sinks + head : nullptr;
      float* const row = scores + r * stride;
      inverses[r] = exp_row(row, from[r], to[r], largest_of_row(row, from[r], to[r], sink), sink);
    }
    const Size weights_stride = num_pages / 2;
    for (int r = 0; r < count; ++r) {
      weigh(scores + r * stride, pages, layout.value_scales, from[r], to[r], begin_block, end_block,
            weights + r * weights_stride);
    }
    with_product_rows(count, [&](auto tile) {
      mix<decltype(tile)::count>({pages, H, weights, weights_stride}, begin_block, end_block, sums);
    });
    for (int r = 0; r < count; ++r) {
      const Size row = begin + (at + r) / group, head = kv_head * group + (at + r) % group;
      write_row(sums + r * H, H, inverses[r], queries.out + (row * queries.num_heads + head) * H);
    }
  }
}

}  // namespace

extern const QuantAttentionKernels quant_attention_kernels = {write, scratch_bytes, attend};

}  // namespace openbook::OPENBOOK_ISA
