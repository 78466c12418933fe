#include "paged_attention_kernels.h"

#include "attention_tiles.h"

namespace openbook::OPENBOOK_ISA {
namespace {

static_assert(kPageTokens == kLanes);

Size scratch(const PagedCache& cache, Size last_position) {
  const Size pages = last_position / kLanes + 1;
  return pages * kLanes * kTileRows + 4 * (pages + kLanes) + 2 * kTileRows * whole_vectors(cache.head_dim);
}

// Where the pages of a sequence lie, for one head.
struct Pages {
  const float** keys;
  const float** values;
};

void find_pages(const PagedCache& cache, const std::int32_t* table, Size first, Size count, Size kv_head, Pages pages) {
  const Size page_size = kLanes * cache.head_dim;
  for (Size page = 0; page < count; ++page) {
    const Size at = (table[first + page] * cache.num_kv_heads + kv_head) * page_size;
    pages.keys[page] = cache.keys + at;
    pages.values[page] = cache.values + at;
  }
}

void attend_rows(const PagedCache& cache, const PagedQueries& queries, Size begin, Size end, Size kv_head,
                 float* scratch) {
  const Size H = cache.head_dim, width = whole_vectors(H), group = queries.num_heads / cache.num_kv_heads;
  const Size first_page = seen_pages(queries, begin).first_page;
  const Size num_pages = queries.positions[end - 1] / kLanes + 1 - first_page;
  Room room = {scratch};
  const Pages pages = {room.pointers(num_pages), room.pointers(num_pages)};
  find_pages(cache, cache.block_tables + queries.sequences[begin] * cache.table_width, first_page, num_pages, kv_head,
             pages);
  float* q = room.floats(kTileRows * H);
  float* sums = room.floats(kTileRows * width);
  float* scores = room.floats(kTileRows * kLanes * num_pages);
  const Sight sight = {pages.keys, {pages.values, H, H}, H, queries.scale};

  const Size num_rows = (end - begin) * group;  // query by query, and for each the heads of the group
  for (Size first = 0; first < num_rows; first += kTileRows) {
    RowTile tile;
    tile.count = static_cast<int>(num_rows - first < kTileRows ? num_rows - first : kTileRows);
    for (int r = 0; r < tile.count; ++r) {
      const Size row = begin + (first + r) / group, head = kv_head * group + (first + r) % group;
      std::memcpy(q + r * H, queries.q + row * queries.q_stride + head * H, sizeof(float) * static_cast<std::size_t>(H));
      const SeenPages seen = seen_pages(queries, row);
      const Size skipped = kLanes * (seen.first_page - first_page);
      tile.begin[r] = static_cast<std::int32_t>(skipped + seen.begin);
      tile.end[r] = static_cast<std::int32_t>(skipped + seen.end);
      tile.sinks[r] = queries.sinks != nullptr ? queries.sinks + head : nullptr;
    }
    attend(tile, q, sight, scores, kLanes * num_pages, sums, width);
    for (int r = 0; r < tile.count; ++r) {
      const Size row = begin + (first + r) / group, head = kv_head * group + (first + r) % group;
      write_row(sums + r * width, H, tile.stats[r].inverse, queries.out + (row * queries.num_heads + head) * H);
    }
  }
}

void score(const PagedCache& cache, const PagedQueries& queries, Size row, Size kv_head, Size first, Size last,
           float* scores, Size stride) {
  const Size H = cache.head_dim, group = queries.num_heads / cache.num_kv_heads, head = kv_head * group;
  const float* keys[kPartPages];
  const float* values[kPartPages];
  find_pages(cache, cache.block_tables + queries.sequences[row] * cache.table_width,
             seen_pages(queries, row).first_page + first, last - first, kv_head, {keys, values});
  for (Size r = 0; r < group; r += kTileRows) {
    const Size count = group - r < kTileRows ? group - r : kTileRows;
    dot_blocks(static_cast<int>(count), queries.q + row * queries.q_stride + (head + r) * H, H, keys, last - first, H,
               queries.scale, scores + (head + r) * stride + kLanes * first, stride);
  }
}

float weigh(const PagedQueries& queries, Size row, Size head, float* scores) {
  const SeenPages seen = seen_pages(queries, row);
  const float* sink = queries.sinks != nullptr ? queries.sinks + head : nullptr;
  return exp_row(scores, seen.begin, seen.end, largest_of_row(scores, seen.begin, seen.end, sink), sink);
}

void mix(const PagedCache& cache, const PagedQueries& queries, Size row, Size kv_head, Size begin, Size end,
         const float* weights, Size stride, const float* inverses, float* scratch) {
  const Size H = cache.head_dim, group = queries.num_heads / cache.num_kv_heads, width = whole_vectors(end - begin);
  const SeenPages seen = seen_pages(queries, row);
  Room room = {scratch};
  const Pages pages = {room.pointers(seen.num_pages), room.pointers(seen.num_pages)};
  find_pages(cache, cache.block_tables + queries.sequences[row] * cache.table_width, seen.first_page, seen.num_pages,
             kv_head, pages);
  for (Size page = 0; page < seen.num_pages; ++page) pages.values[page] += begin;
  float* sums = room.floats(kTileRows * width);
  for (Size first = 0; first < group; first += kTileRows) {
    const int count = static_cast<int>(group - first < kTileRows ? group - first : kTileRows);
    const Size head = kv_head * group + first;
    std::int32_t from[kTileRows], to[kTileRows];
    for (int r = 0; r < count; ++r) {
      from[r] = static_cast<std::int32_t>(seen.begin);
      to[r] = static_cast<std::int32_t>(seen.end);
    }
    std::memset(sums, 0, sizeof(float) * static_cast<std::size_t>(count * width));
    add_ranges<true>(count, from, to, {weights + head * stride, stride}, {pages.values, H, end - begin}, sums, width);
    for (int r = 0; r < count; ++r) {
      write_row(sums + r * width, end - begin, inverses[head + r],
                queries.out + (row * queries.num_heads + head + r) * H + begin);
    }
  }
}

}  // namespace

extern const PagedAttentionKernels paged_attention_kernels = {scratch, attend_rows, score, weigh, mix};

}  // namespace openbook::OPENBOOK_ISA
