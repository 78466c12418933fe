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
  const auto first_seen = [&](Size row) {
    const Size position = queries.positions[row];
    return queries.window != 0 && position >= queries.window ? position - queries.window + 1 : 0;
  };
  const Size first_page = first_seen(begin) / kLanes, base = kLanes * first_page;
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
      tile.begin[r] = static_cast<std::int32_t>(first_seen(row) - base);
      tile.end[r] = static_cast<std::int32_t>(queries.positions[row] + 1 - base);
      tile.sinks[r] = queries.sinks != nullptr ? queries.sinks + head : nullptr;
    }
    attend(tile, q, sight, scores, kLanes * num_pages, sums, width);
    for (int r = 0; r < tile.count; ++r) {
      const Size row = begin + (first + r) / group, head = kv_head * group + (first + r) % group;
      write_row(sums + r * width, H, tile.stats[r].inverse, queries.out + (row * queries.num_heads + head) * H);
    }
  }
}

}  // namespace

extern const PagedAttentionKernels paged_attention_kernels = {scratch, attend_rows};

}  // namespace openbook::OPENBOOK_ISA
